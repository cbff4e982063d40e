"""What a step takes on a cluster: computation, ZeRO's collectives beside it, update, data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.models.cost import encoder_flops
from pipeline.plan.cluster import Cluster
from pipeline.plan.loading import cores_per_gpu
from pipeline.plan.memory import Memory, memory_per_gpu, trained_params, value_bytes
from pipeline.plan.recompute import recomputed_flops, recomputed_for
from pipeline.plan.transfer import gather_seconds, reduce_seconds
from pipeline.plan.work import (
    MaskTokens,
    mean_flops,
    networks_of,
    sample_kept_tokens,
    summarise,
)
from pipeline.run import RunConfig
from pipeline.stages import accumulation

_GIB = 2**30
# Clips that are sampled: the FLOPs are good to 2 %, which no stated bandwidth is.
_CLIPS, _LEAST_MICRO_BATCHES, _MOST_MICRO_BATCHES = 192, 8, 48
# DeepSpeed looks this far ahead when it gathers; the first gather of a pass stands alone.
_FIRST_GATHER = 1
_FLOAT = 4
# Weight and bias of two norms and four linear layers.
_TENSORS_OF_BLOCK = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMasks:
    """What a stage's masks keep at its micro-batch: the same on any number of GPUs."""

    masks: tuple[MaskTokens, ...]
    flops_per_clip: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWork:
    """What a stage's micro-batch asks of one GPU, whatever its network."""

    teacher_flops: float
    forward_flops: float
    """Student and predictor."""
    backward_flops: float
    """Theirs, and of activations that are computed again."""
    model_flops: float
    """Without the latter."""
    tokens: int
    memory: Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimiser step; the parts add up to `seconds`."""

    seconds: float
    compute_seconds: float
    communication_seconds: float
    """Of it what the computation does not hide."""
    update_seconds: float
    data_seconds: float
    """What loader workers are too few for."""
    gradient_seconds: float
    """All micro-batches together: what a background save's copy runs beside."""
    moved_bytes: float
    """What each GPU receives in a step."""
    cores_per_gpu: float
    """Processor cores that keep a GPU in clips."""
    mfu: float


def stage_masks(config: RunConfig, stage_index: int) -> StageMasks:
    """Samples the masks of a stage at its micro-batch."""
    stage = config.stages[stage_index]
    grid = config.grid(stage.frames, stage.resolution)
    num = max(_LEAST_MICRO_BATCHES, min(_MOST_MICRO_BATCHES, _CLIPS // stage.micro_batch))
    drawn = sample_kept_tokens(config, stage_index, num)
    return StageMasks(masks=summarise(drawn), flops_per_clip=mean_flops(config, grid, drawn))


def stage_work(
    config: RunConfig, stage_index: int, drawn: StageMasks, num_gpus: int, memory_gib: float
) -> StageWork:
    """FLOPs and memory of a micro-batch on one of so many GPUs."""
    stage = config.stages[stage_index]
    grid = config.grid(stage.frames, stage.resolution)
    masks, clips = drawn.masks, stage.micro_batch
    total = clips * drawn.flops_per_clip
    teacher = clips * encoder_flops(networks_of(config).encoder, grid.num_tokens)
    again = recomputed_for(config, stage, masks, memory_gib * _GIB, num_gpus)
    means = [(mask.context_mean, mask.target_mean) for mask in masks]
    forward = (total - teacher) / 3.0
    return StageWork(
        teacher_flops=teacher,
        forward_flops=forward,
        backward_flops=2.0 * forward + clips * recomputed_flops(config, means, again),
        model_flops=total,
        tokens=clips * grid.num_tokens,
        memory=memory_per_gpu(config, stage, masks, num_gpus),
    )


def step_time(
    config: RunConfig, stage_index: int, work: StageWork, cluster: Cluster, num_gpus: int
) -> StepTime:
    """One optimiser step of a stage.

    Passes of a micro-batch follow one another: teacher, student and predictor forward, backward.
    Under ZeRO-3 each gathers its weights layer by layer, and the backward pass also scatters its
    gradients; under ZeRO-2 it scatters gradients alone. Of the communication of a pass a share
    `overlap` of its computation hides as much; the first gather of a pass is never hidden. Under
    ZeRO-1 and 2 nothing hides what ends an update: gathering the new weights, and the student's in
    fp32 for the teacher's average.

    Raises:
        ConfigError: The global batch does not divide among so many GPUs.
    """
    stage = config.stages[stage_index]
    repeats = accumulation(stage, config.global_batch, num_gpus)
    rate = compute_rate(cluster, work.tokens)
    passes = [work.teacher_flops / rate, work.forward_flops / rate, work.backward_flops / rate]
    messages = _messages(config, cluster, num_gpus)
    exposed = sum(
        _exposed(busy, message, cluster)
        for busy, message in zip(passes, messages.passes, strict=True)
    )
    computing = repeats * (sum(passes) + cluster.micro_batch_overhead_ms / 1e3)
    talking = repeats * exposed + messages.once
    updating = _update_seconds(config, cluster, num_gpus)
    busy = computing + talking + updating + cluster.step_overhead_ms / 1e3
    cores = cores_per_gpu(
        stage, repeats * stage.micro_batch / busy, cluster.decoded_frames_per_core_second
    )
    seconds = busy * max(1.0, cores / cluster.cores_per_gpu)
    return StepTime(
        seconds=seconds,
        compute_seconds=computing + cluster.step_overhead_ms / 1e3,
        communication_seconds=talking,
        update_seconds=updating,
        data_seconds=seconds - busy,
        gradient_seconds=computing + repeats * exposed,
        moved_bytes=repeats * messages.bytes_each + messages.bytes_once,
        cores_per_gpu=cores,
        mfu=repeats * work.model_flops / seconds / (cluster.peak_tflops * 1e12),
    )


def compute_rate(cluster: Cluster, tokens: float) -> float:
    """FLOP/s of one GPU on a micro-batch of so many tokens: e = best · t / (t + half)."""
    share = cluster.best_efficiency * tokens / (tokens + cluster.half_tokens)
    return cluster.peak_tflops * 1e12 * share


@dataclass(frozen=True, kw_only=True, slots=True)
class _Message:
    """The communication of one pass."""

    seconds: float
    first_seconds: float
    """Its first collective, which nothing can hide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Messages:
    passes: Sequence[_Message]
    """Teacher, forward, backward."""
    once: float
    """Seconds after the last micro-batch."""
    bytes_each: float
    bytes_once: float


_NOTHING = _Message(seconds=0.0, first_seconds=0.0)


def _messages(config: RunConfig, cluster: Cluster, num_gpus: int) -> _Messages:
    student, teacher = trained_params(config)
    size, zero = value_bytes(config), config.zero
    share = (num_gpus - 1) / num_gpus
    scatters = math.ceil(student / zero.reduce_bucket_size)
    scattered = gather_seconds(cluster, num_gpus, size * student, scatters)
    if zero.stage == 3:
        gathered = [_gather(config, cluster, num_gpus, params) for params in (teacher, student)]
        first = gathered[1].first_seconds
        backward = _Message(seconds=gathered[1].seconds + scattered, first_seconds=first)
        moved = size * share * (teacher + 3 * student)
        return _Messages(passes=(*gathered, backward), once=0.0, bytes_each=moved, bytes_once=0.0)
    if zero.stage == 0:
        # Gradients of all micro-batches are summed on the GPU and reduced once.
        once = reduce_seconds(cluster, num_gpus, size * student, scatters)
        moved = 2 * size * share * student
        nothing = (_NOTHING, _NOTHING, _NOTHING)
        return _Messages(passes=nothing, once=once, bytes_each=0.0, bytes_once=moved)
    last = _Message(seconds=scattered, first_seconds=scattered / scatters)
    is_each = zero.stage == 2  # stage 1 scatters its gradients after the last micro-batch
    # The new weights; and for the teacher, which lies whole on every rank, the student's in fp32.
    once = gather_seconds(cluster, num_gpus, size * student, scatters) + reduce_seconds(
        cluster, num_gpus, _FLOAT * teacher, _teacher_tensors(config)
    )
    moved = share * (size * student + 2 * _FLOAT * teacher)
    scattered_bytes = size * share * student
    return _Messages(
        passes=(_NOTHING, _NOTHING, last if is_each else _NOTHING),
        once=once if is_each else once + scattered,
        bytes_each=scattered_bytes if is_each else 0.0,
        bytes_once=moved if is_each else moved + scattered_bytes,
    )


def _teacher_tensors(config: RunConfig) -> int:
    """Parameters of the teacher, each of which is put together by a collective of its own."""
    encoder = networks_of(config).encoder
    levels = max(1, len(encoder.levels))
    return _TENSORS_OF_BLOCK * encoder.dims.depth + 2 + 2 * levels


def _gather(config: RunConfig, cluster: Cluster, num_gpus: int, params: int) -> _Message:
    size, bucket = value_bytes(config), max(1, config.zero.prefetch_bucket_size)
    calls = math.ceil(params / bucket) + _FIRST_GATHER
    return _Message(
        seconds=gather_seconds(cluster, num_gpus, size * params, calls),
        first_seconds=gather_seconds(cluster, num_gpus, size * params / calls),
    )


def _exposed(busy_seconds: float, message: _Message, cluster: Cluster) -> float:
    """What of a pass's communication its computation does not hide."""
    left = message.seconds - min(message.seconds, busy_seconds) * cluster.overlap
    return max(left, message.first_seconds)


def _update_seconds(config: RunConfig, cluster: Cluster, num_gpus: int) -> float:
    student, teacher = trained_params(config)
    stage = config.zero.stage
    own = student / (num_gpus if stage >= 1 else 1) + teacher / (num_gpus if stage == 3 else 1)
    return own * cluster.update_ns_per_parameter * 1e-9
