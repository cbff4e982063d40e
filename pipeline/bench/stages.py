"""Measured steps of a configuration's stages, and what its schedule saves."""

import gc
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline.bench.batches import noise_batches
from pipeline.bench.result import spread
from pipeline.bench.step import OwnStep, StepTime, take_steps
from pipeline.errors import ConfigError
from pipeline.plan.account import batch_flops, batch_recomputed_flops
from pipeline.plan.work import mean_flops, sample_kept_tokens
from pipeline.run import RunConfig
from pipeline.stages import accumulation
from pipeline.track.peaks import utilisation

PAPER_RATIO = 8.4
"""GPU time of ViT-g at full size throughout over that of the schedule (arXiv 2506.09985)."""
_NUM_BATCHES = 4


class MemoryFullError(ConfigError):
    """A stage does not fit into the device's memory."""

    remedy = "Set a smaller micro_batch for that stage, or activation_checkpointing=auto."


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFigures:
    """A stage on one device; medians, seconds of one micro-batch and of one update."""

    stage: str
    clips: int
    """Of a micro-batch."""
    tokens_per_clip: int
    gradient_seconds: float
    update_seconds: float
    spread_ms: dict[str, float]
    """Of gradient and update together."""
    clips_per_second: float
    tokens_per_second: float
    flops_per_clip: float
    mfu: float | None
    recomputed_share: float
    """FLOPs spent on computing activations again, as a share of the model's."""
    peak_memory_gib: float | None
    """Of the device; None on a CPU, which other work shares."""
    setting: dict[str, Any]
    """Recomputed blocks, kernels, whether compiled."""

    def step_seconds(self, accumulation: int) -> float:
        """Of an optimiser step of several micro-batches."""
        return accumulation * self.gradient_seconds + self.update_seconds

    def to_dict(self) -> dict[str, Any]:
        """For a result file."""
        return asdict(self)


def measure_stages(
    config: RunConfig, stages: Sequence[int], device: torch.device, rounds: int
) -> list[StageFigures]:
    """Measures stages with one set of networks, one after the other."""
    step = OwnStep(config, device)
    figures = [measure_stage(step, index, device, rounds) for index in stages]
    del step
    gc.collect()
    return figures


def measure_stage(
    step: OwnStep, stage_index: int, device: torch.device, rounds: int
) -> StageFigures:
    """Steps of one stage on micro-batches whose masks keep different numbers of tokens.

    Raises:
        MemoryFullError: They do not fit into the device's memory.
    """
    config, tuner = step.config, step.tuner
    batches = noise_batches(config, stage_index, device, _NUM_BATCHES)
    try:
        times = take_steps(step, batches, rounds, warm_up=_NUM_BATCHES)
    except torch.OutOfMemoryError as error:
        raise MemoryFullError(
            f"stage {config.stages[stage_index].name} with micro_batch "
            f"{config.stages[stage_index].micro_batch} does not fit into this GPU's memory: "
            f"{str(error).splitlines()[0]}"
        ) from error
    used = [batches[number % _NUM_BATCHES] for number in range(rounds)]
    gradient = statistics.median(time.gradient_seconds for time in times)
    update = statistics.median(time.update_seconds for time in times)
    clips, tokens = len(batches[0].keys), batches[0].grid.num_tokens
    flops = statistics.fmean(batch_flops(config.objective, batch) for batch in used)
    again = statistics.fmean(
        batch_recomputed_flops(config, batch, tuner.recomputed) for batch in used
    )
    on_gpu = device.type == "cuda"
    peak_gib = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    return StageFigures(
        stage=config.stages[stage_index].name,
        clips=clips,
        tokens_per_clip=tokens,
        gradient_seconds=gradient,
        update_seconds=update,
        spread_ms=spread([1e3 * _seconds(time) for time in times]),
        clips_per_second=clips / (gradient + update),
        tokens_per_second=clips * tokens / (gradient + update),
        flops_per_clip=flops / clips,
        mfu=utilisation(flops, gradient + update, tuner.peak, 1),
        recomputed_share=again / flops,
        peak_memory_gib=peak_gib,
        setting=tuner.chosen,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleFigures:
    """What a run's stages take beside its last stage's size in every step."""

    device_hours: float
    device_hours_at_last_size: float
    time_ratio: float
    flop_ratio: float
    paper_ratio: float = PAPER_RATIO


def schedule_figures(
    config: RunConfig, figures: Sequence[StageFigures], num_devices: int = 1
) -> ScheduleFigures:
    """Step time times steps of every stage, and of all steps at the last stage's size.

    Args:
        config: The run.
        figures: All of its stages, measured on one device.
        num_devices: Devices that share the global batch; communication does not count.

    Raises:
        ConfigError: The global batch does not divide among so many.
    """
    seconds, flops = [], []
    for index, (stage, one) in enumerate(zip(config.stages, figures, strict=True)):
        num = accumulation(stage, config.global_batch, num_devices)
        seconds.append(one.step_seconds(num) * num_devices)
        grid = config.grid(stage.frames, stage.resolution)
        flops.append(mean_flops(config, grid, sample_kept_tokens(config, index)))
    steps = [stage.steps for stage in config.stages]
    own = sum(n * s for n, s in zip(steps, seconds, strict=True))
    full = sum(steps) * seconds[-1]
    own_flops = sum(n * f for n, f in zip(steps, flops, strict=True))
    return ScheduleFigures(
        device_hours=own / 3600.0,
        device_hours_at_last_size=full / 3600.0,
        time_ratio=full / own,
        flop_ratio=sum(steps) * flops[-1] / own_flops,
    )


def _seconds(time: StepTime) -> float:
    return time.gradient_seconds + time.update_seconds
