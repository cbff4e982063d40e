"""How fast a run is, what it waits for, and when it will be done."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.clip import StepReport
from pipeline.track.metrics import LoggedStep, StageCost

WINDOW_STEPS = 50
"""Steps over which the rates shown live are taken: long enough to smooth a slow shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Medians over a window of steps of one stage; shares are between 0 and 1."""

    step_seconds: float
    clips_per_second: float
    tokens_per_second: float
    wait_share: float
    """Part of the step time in which the loader was waited for."""
    mfu: float | None
    """Model FLOPs utilisation: useful FLOPs over the stated peak of all GPUs; None without one."""
    peak_memory_gib: float
    """Largest of the window."""


def window_rates(
    reports: Sequence[StepReport], *, peak_tflops: float | None = None, world_size: int = 1
) -> Rates | None:
    """Rates over the reports that belong to the same stage as the last one.

    Args:
        reports: Consecutive steps; a window's worth, or all of a stage.
        peak_tflops: Peak of one GPU; without it the reports' own MFU counts, if they have any.
        world_size: GPUs that shared the global batch.

    Returns:
        The medians, or None if there is no step yet. The first step of a stage is left out where
        there are others: it pays for compilation, allocation and the first fill of the loader.
    """
    if not reports:
        return None
    same = [report for report in reports if report.stage == reports[-1].stage]
    first_of_stage = len(same) < len(reports) or reports[0].step == 1
    measured = same[1:] if first_of_stage and len(same) > 1 else same
    step_seconds = _median([max(report.step_seconds, 1e-9) for report in measured])
    flops_per_second = measured[-1].flops / step_seconds
    return Rates(
        step_seconds=step_seconds,
        clips_per_second=measured[-1].clips / step_seconds,
        tokens_per_second=measured[-1].tokens / step_seconds,
        wait_share=wait_share(measured),
        peak_memory_gib=max(report.peak_memory_gib for report in measured),
        mfu=flops_per_second / (peak_tflops * 1e12 * world_size)
        if peak_tflops
        else _own_mfu(measured[-1], step_seconds),
    )


def wait_share(reports: Sequence[StepReport]) -> float:
    """Part of these steps' time that went into waiting for data.

    A mean, not a median: a loader that stalls once in twenty steps must show.
    """
    total = sum(report.step_seconds for report in reports)
    waited = sum(report.data_wait_seconds for report in reports)
    return min(1.0, waited / total) if total > 0 else 0.0


def eta_seconds(steps: Sequence[LoggedStep], plan: Sequence[StageCost]) -> float | None:
    """Time left, from the recent rate and what the remaining stages cost.

    A stage that was measured counts with its own median step; one that was not counts with the
    last stage's, scaled by the ratio of their FLOPs. What lies between steps, such as saving,
    counts as the share it had in the window.

    Args:
        steps: Recent steps, ascending.
        plan: All stages of the run.

    Returns:
        Seconds, or None before the first step or without a plan.
    """
    if not steps or not plan:
        return None
    current = steps[-1].report
    measured = _median_seconds_by_stage([step.report for step in steps])
    seconds_per_flop = measured[current.stage] / max(_cost(plan, current.stage), 1e-9)
    seconds = 0.0
    last_step_of_stage = 0
    for stage, cost in enumerate(plan):
        first_step_of_stage, last_step_of_stage = (
            last_step_of_stage,
            last_step_of_stage + cost.steps,
        )
        remaining = last_step_of_stage - max(current.step, first_step_of_stage)
        if remaining > 0:
            seconds += remaining * measured.get(stage, seconds_per_flop * cost.flops_per_step)
    return seconds * _overhead(steps)


def _own_mfu(report: StepReport, step_seconds: float) -> float | None:
    """A step's MFU, as if it had taken the window's median time."""
    return None if report.mfu is None else report.mfu * report.step_seconds / step_seconds


def _median_seconds_by_stage(reports: Sequence[StepReport]) -> dict[int, float]:
    stages = {report.stage for report in reports}
    rates = {
        stage: window_rates([report for report in reports if report.stage == stage])
        for stage in stages
    }
    return {stage: rate.step_seconds for stage, rate in rates.items() if rate is not None}


def _cost(plan: Sequence[StageCost], stage: int) -> float:
    return plan[stage].flops_per_step if stage < len(plan) else 0.0


def _overhead(steps: Sequence[LoggedStep]) -> float:
    """Wall time over step time in the window; 1 if a pause or resume makes it meaningless."""
    inside = sum(step.report.step_seconds for step in steps[1:])
    wall = steps[-1].time - steps[0].time
    num_steps = steps[-1].report.step - steps[0].report.step
    if inside <= 0 or num_steps != len(steps) - 1:
        return 1.0
    return min(max(1.0, wall / inside), 2.0)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)
