"""A run on one GPU to thousands: step time, efficiency, time and cost to finish, best layout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from pipeline.plan.cluster import Cluster
from pipeline.plan.failures import Losses, losses
from pipeline.plan.steptime import (
    StageMasks,
    StageWork,
    StepTime,
    stage_masks,
    stage_work,
    step_time,
)
from pipeline.run import RunConfig
from pipeline.stages import Stage

_HOUR = 3600.0
_USABLE_SHARE = 0.9
_LARGEST_MICRO_BATCH = 96
_ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLayout:
    """A stage on so many GPUs, in the way that takes least time."""

    name: str
    micro_batch: int
    accumulation: int
    memory_gib: float
    step: StepTime
    losses: Losses
    hours: float
    """Of the stage, failures included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A run on so many GPUs, in the way that takes least time."""

    num_gpus: int
    zero_stage: int
    stages: tuple[StageLayout, ...]
    hours: float
    """To finish, failures and saves included."""
    gpu_hours: float
    cost: float
    """In the currency of the cluster's price."""
    mfu: float
    """Model FLOPs over the peak, all the time included."""
    efficiency: float
    """GPU-hours of the fewest GPUs of the table over these."""
    goodput: float
    """Share of the time in steps that count."""
    other_micro_batch: bool
    """A stage has another micro-batch than the configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Impossible:
    """So many GPUs cannot run it."""

    num_gpus: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """A run over numbers of GPUs."""

    name: str
    cluster: Cluster
    layouts: tuple[Layout, ...]
    impossible: tuple[Impossible, ...]
    micro_batch_is_recipe: bool
    """Masks are cut to the shortest of a micro-batch, so another one is another recipe."""


def scale(
    config: RunConfig, cluster: Cluster, gpus: Sequence[int], *, keep_recipe: bool = False
) -> Scaling:
    """The best layout of a run on each number of GPUs.

    Args:
        config: The run.
        cluster: What it runs on.
        gpus: Numbers of GPUs.
        keep_recipe: Keep the configuration's micro-batches and ZeRO stage.

    Raises:
        ConfigError: The objective's networks are not those this arithmetic knows.
    """
    planner = _Planner(config, cluster, keep_recipe=keep_recipe)
    found = [planner.best(number) for number in sorted(set(gpus))]
    layouts = [one for one in found if isinstance(one, Layout)]
    least = layouts[0].gpu_hours if layouts else 0.0
    return Scaling(
        name=config.name,
        cluster=cluster,
        layouts=tuple(replace(one, efficiency=least / one.gpu_hours) for one in layouts),
        impossible=tuple(one for one in found if isinstance(one, Impossible)),
        micro_batch_is_recipe=any(
            config.masks_of(stage).truncate == "min" for stage in config.stages
        ),
    )


def numbers_between(first: int, last: int, global_batch: int) -> list[int]:
    """Powers of two and three times those from first to last that divide the batch; and the ends.

    Those that do not divide it are left out, but for the ends, which were asked for by name.
    """
    powers = [factor << shift for factor in (1, 3) for shift in range(last.bit_length())]
    inside = {n for n in powers if first <= n <= last and global_batch % n == 0}
    return sorted(inside | {first, last})


class _Planner:
    def __init__(self, config: RunConfig, cluster: Cluster, *, keep_recipe: bool) -> None:
        self._config, self._cluster, self._keep = config, cluster, keep_recipe
        self._masks: dict[tuple[int, int], StageMasks] = {}

    def best(self, num_gpus: int) -> Layout | Impossible:
        config = self._config
        if config.global_batch % num_gpus:
            near = _nearest_divisors(config.global_batch, num_gpus)
            reason = f"{config.global_batch} clips do not divide among them; {near} would do"
            return Impossible(num_gpus=num_gpus, reason=reason)
        zeros = (config.zero.stage,) if self._keep else _ZERO_STAGES
        found = [layout for zero in zeros if (layout := self._layout(num_gpus, zero)) is not None]
        if not found:
            return Impossible(num_gpus=num_gpus, reason=self._too_large(num_gpus))
        # Of layouts that take the same time within a per cent, the one that moves least.
        quickest = min(layout.hours for layout in found)
        return next(layout for layout in found if layout.hours <= 1.01 * quickest)

    def _layout(self, num_gpus: int, zero: int) -> Layout | None:
        stages = []
        for index in range(len(self._config.stages)):
            best = self._best_stage(num_gpus, zero, index)
            if best is None:
                return None
            stages.append(best)
        hours = sum(stage.hours for stage in stages)
        flops_seconds = sum(
            stage.step.mfu * stage.step.seconds * own.steps
            for stage, own in zip(stages, self._config.stages, strict=True)
        )
        seconds = sum(
            stage.step.seconds * own.steps
            for stage, own in zip(stages, self._config.stages, strict=True)
        )
        return Layout(
            num_gpus=num_gpus,
            zero_stage=zero,
            stages=tuple(stages),
            hours=hours,
            gpu_hours=hours * num_gpus,
            cost=hours * num_gpus * self._cluster.price_per_gpu_hour,
            mfu=flops_seconds / (hours * _HOUR),
            efficiency=1.0,
            goodput=seconds / (hours * _HOUR),
            other_micro_batch=any(
                stage.micro_batch != own.micro_batch
                for stage, own in zip(stages, self._config.stages, strict=True)
            ),
        )

    def _best_stage(self, num_gpus: int, zero: int, index: int) -> StageLayout | None:
        found = []
        for micro_batch in self._micro_batches(num_gpus, index):
            one = self._stage(num_gpus, zero, index, micro_batch)
            if one is None:
                break  # larger ones take more memory still
            found.append(one)
        return min(found, key=lambda one: one.hours, default=None)

    def _micro_batches(self, num_gpus: int, index: int) -> Iterator[int]:
        share = self._config.global_batch // num_gpus
        own = self._config.stages[index].micro_batch
        for size in range(1, min(share, _LARGEST_MICRO_BATCH) + 1):
            if share % size == 0 and (not self._keep or size == own):
                yield size

    def _stage(self, num_gpus: int, zero: int, index: int, micro_batch: int) -> StageLayout | None:
        """A stage in one way; None if it does not fit into memory."""
        config = _changed(self._config, index, zero, micro_batch)
        work = self._work(config, index, num_gpus)
        if work.memory.total_gib > _USABLE_SHARE * self._cluster.memory_gib:
            return None
        step = step_time(config, index, work, self._cluster, num_gpus)
        lost = losses(config, step, self._cluster, num_gpus)
        stage = config.stages[index]
        return StageLayout(
            name=stage.name,
            micro_batch=micro_batch,
            accumulation=config.global_batch // num_gpus // micro_batch,
            memory_gib=work.memory.total_gib,
            step=step,
            losses=lost,
            hours=stage.steps * step.seconds / lost.goodput / _HOUR,
        )

    def _work(self, config: RunConfig, index: int, num_gpus: int) -> StageWork:
        key = (index, config.stages[index].micro_batch)
        if key not in self._masks:
            self._masks[key] = stage_masks(config, index)
        return stage_work(config, index, self._masks[key], num_gpus, self._cluster.memory_gib)

    def _too_large(self, num_gpus: int) -> str:
        zero = self._config.zero.stage if self._keep else _ZERO_STAGES[-1]
        least = []
        for index, stage in enumerate(self._config.stages):
            size = next(self._micro_batches(num_gpus, index), None)
            if size is None:
                return (
                    f"micro_batch {stage.micro_batch} of {stage.name} does not divide a GPU's share"
                )
            config = _changed(self._config, index, zero, size)
            least.append(self._work(config, index, num_gpus).memory.total_gib)
        return f"needs {max(least):,.0f} GiB a GPU, which has {self._cluster.memory_gib:g}"


def _changed(config: RunConfig, index: int, zero: int, micro_batch: int) -> RunConfig:
    stages: list[Stage] = list(config.stages)
    stages[index] = stages[index].model_copy(update={"micro_batch": micro_batch})
    parts = {"stages": tuple(stages), "zero": config.zero.model_copy(update={"stage": zero})}
    return config.model_copy(update=parts)


def _nearest_divisors(global_batch: int, wanted: int) -> str:
    below = next((n for n in range(min(wanted, global_batch), 0, -1) if global_batch % n == 0), 1)
    above = next((n for n in count(wanted) if n > global_batch or global_batch % n == 0), 0)
    return f"{below}" if above > global_batch else f"{below} or {above}"
