"""Memory of one GPU, estimated from the sizes of what it has to hold."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.models.cost import encoder_params, predictor_params
from pipeline.models.layers import ModelDims
from pipeline.plan.work import MaskTokens, networks_of
from pipeline.run import RunConfig
from pipeline.stages import Stage

_GIB = 2**30
_FLOAT = 4
# DeepSpeed's default, in elements: weights that are whole at one time.
_MAX_LIVE = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory of one GPU in GiB, largest micro-batch; formulas in `memory_per_gpu`."""

    states_gib: float
    """Weights, gradients, optimiser state and teacher average: this GPU's share of them."""
    buffers_gib: float
    """Gathered weights and the buffer that gradients are reduced in."""
    activations_gib: float
    """Student, predictor and targets of one micro-batch, everything kept for the backward pass."""
    checkpointed_activations_gib: float
    """The same with activation checkpointing."""
    total_gib: float
    """States, buffers and activations as the configuration has them."""


def memory_per_gpu(
    config: RunConfig, stage: Stage, masks: Sequence[MaskTokens], num_gpus: int
) -> Memory:
    """Estimate of the peak memory of one GPU.

    With P student parameters (encoder and predictor), T the teacher's, N GPUs, e = 2 bytes in
    bf16 and 4 in fp32, b clips per micro-batch, D width, M hidden width, L layers:

    - states: P · (weights e + gradients e + fp32 gradient at the update 4 + Adam's m and v 8
      + fp32 master 4, in bf16 only) + T · (weights e + fp32 average 4, in bf16 only), each
      divided by N if the ZeRO stage partitions it (1 optimiser, 2 gradients, 3 weights; the
      average is cut like the weights);
    - buffers under ZeRO-3: gathered weights e · min(P + T, 1e9, DeepSpeed's default) and gradients
      to reduce e · min(P, zero.reduce_bucket_size);
    - activations of a token in a layer: e · (10 D + 2 M), which are its input, two normalised
      copies, q k v (3 D), rotated q and k (2 D), the attention's output twice, the middle of the
      block, and the MLP before and after its GELU; attention scores are never kept by a fused
      kernel. The student holds the context of all masks, the predictor context and target;
    - with activation checkpointing: e · D per token and layer, plus twice one layer in full (its
      activations and their gradients);
    - either way the clips (uint8 and e, 3 channels), the teacher's layer at work and its
      normalised fp32 output for all tokens, and predictions and targets in fp32.

    The largest sampled masks are taken. Not counted: the CUDA context (about 1 GiB), the
    communication library and the allocator's fragments; leave a tenth.
    """
    states = _states(config, num_gpus)
    buffers = _buffers(config)
    full, checkpointed = (
        activation_bytes(config, stage, masks, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    # `auto` keeps whatever fits, so what it needs at least is what counts.
    activations = checkpointed if config.recompute(stage) else full
    return Memory(
        states_gib=states / _GIB,
        buffers_gib=buffers / _GIB,
        activations_gib=full / _GIB,
        checkpointed_activations_gib=checkpointed / _GIB,
        total_gib=(states + buffers + activations) / _GIB,
    )


def layer_bytes_per_token(dims: ModelDims, num_bytes: int) -> int:
    """What one layer keeps of one token for its backward pass: e · (10 D + 2 M)."""
    return num_bytes * (10 * dims.width + 2 * dims.mlp_hidden)


def reserved_bytes(config: RunConfig, num_gpus: int) -> float:
    """States and buffers: what of a GPU's memory is not there for activations."""
    return _states(config, num_gpus) + _buffers(config)


def _states(config: RunConfig, num_gpus: int) -> float:
    student, teacher = trained_params(config)
    num_bytes = value_bytes(config)
    # In fp32 the weights are their own master copy and the teacher its own average.
    copy = 0 if num_bytes == _FLOAT else _FLOAT
    stage = config.zero.stage
    weights = student * num_bytes + teacher * (num_bytes + copy)
    gradients = student * (num_bytes + _FLOAT)
    optimiser = student * (2 * _FLOAT + copy)
    return (
        weights / (num_gpus if stage >= 3 else 1)
        + gradients / (num_gpus if stage >= 2 else 1)
        + optimiser / (num_gpus if stage >= 1 else 1)
    )


def _buffers(config: RunConfig) -> float:
    student, teacher = trained_params(config)
    gathered = min(student + teacher, _MAX_LIVE) if config.zero.stage == 3 else 0
    return value_bytes(config) * (gathered + min(student, config.zero.reduce_bucket_size))


def activation_bytes(
    config: RunConfig, stage: Stage, masks: Sequence[MaskTokens], *, checkpointing: bool
) -> float:
    """What one micro-batch takes besides states and buffers; see `memory_per_gpu`."""
    networks, num_bytes = networks_of(config), value_bytes(config)
    tokens = config.grid(stage.frames, stage.resolution).num_tokens
    dims = networks.encoder.dims
    passes = [(dims, mask.context_max) for mask in masks] + [
        (networks.predictor.dims, mask.context_max + mask.target_max) for mask in masks
    ]
    if checkpointing:
        kept = sum(num_bytes * dim.width * dim.depth * count for dim, count in passes)
        # The tokens of all masks go through a block together.
        at_work: dict[ModelDims, int] = {}
        for dim, count in passes:
            at_work[dim] = at_work.get(dim, 0) + layer_bytes_per_token(dim, num_bytes) * count
        kept += 2 * max(at_work.values(), default=0)
    else:
        kept = sum(
            layer_bytes_per_token(dim, num_bytes) * dim.depth * count for dim, count in passes
        )
    # The teacher is done before the student begins: only the larger of the two counts.
    kept = max(kept, tokens * layer_bytes_per_token(dims, num_bytes))
    clip = 3 * stage.frames * stage.resolution**2 * (1 + num_bytes)
    targets = tokens + 2 * sum(mask.target_max for mask in masks)
    return stage.micro_batch * (kept + clip + targets * _FLOAT * dims.width)


def trained_params(config: RunConfig) -> tuple[int, int]:
    """Parameters that are trained, and those of the teacher."""
    networks = networks_of(config)
    teacher = encoder_params(networks.encoder)
    return teacher + predictor_params(
        networks.predictor,
        networks.encoder.dims.width,
        levels=max(1, len(networks.encoder.levels)),
    ), teacher


def value_bytes(config: RunConfig) -> int:
    """Bytes of a number that networks compute in."""
    return 2 if config.precision == "bf16" else _FLOAT
