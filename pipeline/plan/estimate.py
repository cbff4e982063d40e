"""The plan of a run, stage by stage and in total."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.models.cost import encoder_params, predictor_params
from pipeline.plan.evidence import USUAL_UTILISATION
from pipeline.plan.memory import Memory, memory_per_gpu
from pipeline.plan.work import (
    MaskTokens,
    mean_flops,
    networks_of,
    sample_kept_tokens,
    summarise,
)
from pipeline.run import RunConfig
from pipeline.stages import Recompute, accumulation, total_steps

_SECONDS_PER_HOUR = 3600.0
# Most clips of Something-Something and Kinetics are shorter.
_LONG_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the run is planned for."""

    num_gpus: int
    utilisation: float
    """Share of the peak that goes into model FLOPs; recomputed activations count as lost."""
    peak_tflops: float
    """Dense peak of one GPU in the run's precision; 989 is an H100 in bf16, 312 an A100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage of the run, or one row of totals."""

    name: str
    steps: int
    frames: int
    fps: float
    resolution: int
    micro_batch: int
    accumulation: int
    tokens_per_clip: int
    clips: int
    tokens: int
    masks: tuple[MaskTokens, ...]
    flops_per_clip: float
    """Forward and backward; the teacher forward only."""
    flops: float
    gpu_hours: float
    wall_hours: float
    memory: Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """Plan of a whole run."""

    name: str
    machine: Machine
    global_batch: int
    encoder_params: int
    predictor_params: int
    zero_stage: int
    activation_checkpointing: Recompute
    """Of the run; a stage may have its own."""
    stages: tuple[StagePlan, ...]
    steps: int
    clips: int
    tokens: int
    flops: float
    gpu_hours: float
    wall_hours: float
    peak_memory_gib: float
    gpu_hours_at_last_size: float
    """If every step of the run were trained at the last stage's clip size."""
    ratio_to_last_size: float
    """How many times more that would be; a ratio of FLOPs."""
    warnings: tuple[str, ...]


def plan_run(
    config: RunConfig,
    *,
    num_gpus: int | None = None,
    utilisation: float = USUAL_UTILISATION,
    peak_tflops: float = 989.0,
) -> RunPlan:
    """Plan every stage of a run.

    Args:
        config: The run.
        num_gpus: GPUs it is to run on; if None, the most that divide every stage.
        utilisation: Share of the peak that goes into model FLOPs, in (0, 1].
        peak_tflops: Dense peak of one GPU in TFLOP/s.

    Raises:
        ConfigError: The global batch does not divide among so many GPUs, a mask does not fit a
            stage's grid, or the objective's networks are not those this arithmetic knows.
    """
    machine = Machine(
        num_gpus=most_gpus(config) if num_gpus is None else num_gpus,
        utilisation=utilisation,
        peak_tflops=peak_tflops,
    )
    stages = tuple(_plan_stage(config, index, machine) for index in range(len(config.stages)))
    networks = networks_of(config)
    flops = sum(stage.flops for stage in stages)
    steps = total_steps(config.stages)
    flops_at_last_size = stages[-1].flops / stages[-1].steps * steps
    return RunPlan(
        name=config.name,
        machine=machine,
        global_batch=config.global_batch,
        encoder_params=encoder_params(networks.encoder),
        predictor_params=predictor_params(
            networks.predictor,
            networks.encoder.dims.width,
            levels=max(1, len(networks.encoder.levels)),
        ),
        zero_stage=config.zero.stage,
        activation_checkpointing=config.activation_checkpointing,
        stages=stages,
        steps=steps,
        clips=sum(stage.clips for stage in stages),
        tokens=sum(stage.tokens for stage in stages),
        flops=flops,
        gpu_hours=_gpu_hours(flops, machine),
        wall_hours=_gpu_hours(flops, machine) / machine.num_gpus,
        peak_memory_gib=max(stage.memory.total_gib for stage in stages),
        gpu_hours_at_last_size=_gpu_hours(flops_at_last_size, machine),
        ratio_to_last_size=flops_at_last_size / flops,
        warnings=tuple(_warnings(stages)),
    )


def most_gpus(config: RunConfig) -> int:
    """The largest world size at which the global batch divides in every stage."""
    return math.gcd(*(config.global_batch // stage.micro_batch for stage in config.stages))


def _plan_stage(config: RunConfig, index: int, machine: Machine) -> StagePlan:
    stage = config.stages[index]
    grid = config.grid(stage.frames, stage.resolution)
    drawn = sample_kept_tokens(config, index)
    flops_per_clip = mean_flops(config, grid, drawn)
    masks = summarise(drawn)
    clips = stage.steps * config.global_batch
    gpu_hours = _gpu_hours(flops_per_clip * clips, machine)
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        frames=stage.frames,
        fps=stage.fps,
        resolution=stage.resolution,
        micro_batch=stage.micro_batch,
        accumulation=accumulation(stage, config.global_batch, machine.num_gpus),
        tokens_per_clip=grid.num_tokens,
        clips=clips,
        tokens=clips * grid.num_tokens,
        masks=masks,
        flops_per_clip=flops_per_clip,
        flops=flops_per_clip * clips,
        gpu_hours=gpu_hours,
        wall_hours=gpu_hours / machine.num_gpus,
        memory=memory_per_gpu(config, stage, masks, machine.num_gpus),
    )


def _gpu_hours(flops: float, machine: Machine) -> float:
    return flops / (machine.peak_tflops * 1e12 * machine.utilisation) / _SECONDS_PER_HOUR


def _warnings(stages: Sequence[StagePlan]) -> list[str]:
    found = []
    for stage in stages:
        seconds = stage.frames / stage.fps
        if seconds > _LONG_WINDOW_SECONDS:
            found.append(
                f"Clips of stage {stage.name} last {seconds:g} seconds: shorter videos are filled "
                "up with repetitions of their last frame."
            )
    last = stages[-1]
    if last.tokens_per_clip < max(stage.tokens_per_clip for stage in stages):
        found.append(
            f"The last stage, {last.name}, has fewer tokens per clip than an earlier one: the "
            "ratio to its size says nothing about savings."
        )
    return found
