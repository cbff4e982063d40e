"""How many blocks must compute their activations again so that a stage fits into memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.models.cost import encoder_flops, predictor_flops
from pipeline.plan.memory import (
    activation_bytes,
    layer_bytes_per_token,
    reserved_bytes,
    value_bytes,
)
from pipeline.plan.work import MaskTokens, networks_of
from pipeline.run import RunConfig
from pipeline.stages import Stage

# The allocator's fragments, the communication library, and masks larger than the sampled ones.
_USABLE_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """The blocks of one network, as alike as they are."""

    name: str
    depth: int
    saved_bytes: float
    """Memory that a micro-batch no longer takes for each block that is recomputed."""
    flops: float
    """What recomputing one block for one micro-batch costs."""
    working_bytes: float
    """What one block takes while it is recomputed, with its gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputed:
    """Recomputed blocks of each network."""

    encoder: int = 0
    predictor: int = 0


def choose_recomputed(
    stacks: Sequence[Stack], needed_bytes: float, free_bytes: float
) -> dict[str, int]:
    """The fewest blocks, counted in FLOPs, whose recomputation makes a stage fit.

    Blocks of the network that frees most memory per FLOP are taken first; what does not fit even
    with all of them recomputed gets all of them.

    Args:
        stacks: The networks.
        needed_bytes: Activations of a micro-batch if nothing is recomputed.
        free_bytes: Memory that there is for them.

    Returns:
        Recomputed blocks by the name of the stack.
    """
    chosen = {stack.name: 0 for stack in stacks}
    excess = needed_bytes - free_bytes
    if excess <= 0:
        return chosen
    # One block is held in full while it is recomputed, whichever it is.
    excess += max((stack.working_bytes for stack in stacks), default=0.0)
    for stack in sorted(stacks, key=lambda one: one.flops / max(one.saved_bytes, 1.0)):
        while excess > 0 and chosen[stack.name] < stack.depth:
            chosen[stack.name] += 1
            excess -= stack.saved_bytes
    return chosen


def recomputed_for(
    config: RunConfig,
    stage: Stage,
    masks: Sequence[MaskTokens],
    memory_bytes: float,
    num_gpus: int,
) -> Recomputed:
    """What `activation_checkpointing` comes to in a stage.

    Args:
        config: The run.
        stage: One of its stages.
        masks: What the stage's masks keep.
        memory_bytes: Memory of the device that this process can have, all in all.
        num_gpus: Ranks of the run.

    Returns:
        All blocks, none, or with `auto` as many as memory asks for.
    """
    networks, wanted = networks_of(config), config.recompute(stage)
    if wanted != "auto":
        every = Recomputed(
            encoder=networks.encoder.dims.depth, predictor=networks.predictor.dims.depth
        )
        return every if wanted else Recomputed()
    free = _USABLE_SHARE * memory_bytes - reserved_bytes(config, num_gpus)
    needed = activation_bytes(config, stage, masks, checkpointing=False)
    chosen = choose_recomputed(_stacks(config, stage, masks), needed, free)
    return Recomputed(encoder=chosen["encoder"], predictor=chosen["predictor"])


def recomputed_flops(
    config: RunConfig, kept: Sequence[tuple[float, float]], recomputed: Recomputed
) -> float:
    """FLOPs of computing blocks again for one clip; (context, target) tokens of each mask."""
    if not recomputed.encoder and not recomputed.predictor:
        return 0.0
    return sum(
        recomputed.encoder * _encoder_block_flops(config, context)
        + recomputed.predictor * _predictor_block_flops(config, context, target)
        for context, target in kept
    )


def _stacks(config: RunConfig, stage: Stage, masks: Sequence[MaskTokens]) -> tuple[Stack, Stack]:
    networks, clips = networks_of(config), stage.micro_batch
    context = clips * sum(mask.context_max for mask in masks)
    whole = context + clips * sum(mask.target_max for mask in masks)
    stacks = []
    for name, dims, tokens in (
        ("encoder", networks.encoder.dims, context),
        ("predictor", networks.predictor.dims, whole),
    ):
        layer = layer_bytes_per_token(dims, value_bytes(config))
        kept = value_bytes(config) * dims.width
        stacks.append(
            Stack(
                name=name,
                depth=dims.depth,
                saved_bytes=float(tokens * (layer - kept)),
                flops=clips * _block_flops(config, name, masks),
                working_bytes=2.0 * tokens * layer,
            )
        )
    return stacks[0], stacks[1]


def _block_flops(config: RunConfig, name: str, masks: Sequence[MaskTokens]) -> float:
    if name == "encoder":
        return sum(_encoder_block_flops(config, mask.context_max) for mask in masks)
    return sum(_predictor_block_flops(config, mask.context_max, mask.target_max) for mask in masks)


def _encoder_block_flops(config: RunConfig, context: float) -> float:
    encoder = networks_of(config).encoder
    return encoder_flops(encoder, round(context), embedded=0) / encoder.dims.depth


def _predictor_block_flops(config: RunConfig, context: float, target: float) -> float:
    predictor = networks_of(config).predictor
    # Without an encoder's width nothing is left but the blocks.
    return predictor_flops(predictor, 0, round(context), round(target)) / predictor.dims.depth
