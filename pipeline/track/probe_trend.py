"""Probe scores along a run: one number per checkpoint, and what luck can do to it."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.track.folder import ProbeScore

_CLEAR = 2.0
"""Standard errors from which on a difference is not called luck."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredStep:
    """A checkpoint's score: the mean top-1 over tasks and heads."""

    step: int
    score: float
    error: float
    """Standard error, as many validation clips as there are leave it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeTrend:
    """Trained checkpoints that were scored on the same tasks with the same heads."""

    points: tuple[ScoredStep, ...]
    """By rising step; never empty."""
    words: str
    """Which scores these are."""

    @property
    def newest(self) -> ScoredStep:
        """Of the newest checkpoint."""
        return self.points[-1]

    @property
    def best(self) -> ScoredStep:
        """The highest; the newest of equals."""
        return self.ranked()[0]

    def ranked(self) -> list[ScoredStep]:
        """Best first; of equals the newest."""
        return sorted(self.points, key=lambda point: (-point.score, -point.step))

    def is_clearly_below(self, one: ScoredStep, other: ScoredStep) -> bool:
        """Whether a score is lower than another by more than luck."""
        error = math.hypot(one.error, other.error)
        return other.score - one.score > _CLEAR * error


def probe_trend(probes: Sequence[ProbeScore], by: str | None = None) -> ProbeTrend | None:
    """Scores of trained checkpoints.

    A checkpoint counts if all tasks and heads were run on it that the comparison is made of: means
    over different ones do not compare.

    Args:
        probes: All scores.
        by: Only those of TASK or TASK/HEAD.

    Returns:
        The scores; None if there are none.
    """
    wanted = [p for p in probes if p.trained and p.step and _is_wanted(p, by)]
    if not wanted:
        return None
    table: dict[int, dict[tuple[str, str], list[ProbeScore]]] = defaultdict(dict)
    for probe in wanted:
        table[probe.step or 0].setdefault((probe.task, probe.head), []).append(probe)
    asked = _asked(table)
    points = tuple(
        _point(step, [cells[key] for key in sorted(asked)])
        for step, cells in sorted(table.items())
        if asked <= set(cells)
    )
    words = ", ".join(f"{task} {head}" for task, head in sorted(asked))
    return ProbeTrend(points=points, words=words if len(asked) == 1 else f"mean of {words}")


def best_steps(
    probes: Sequence[ProbeScore], by: str | None, there: Sequence[int]
) -> list[tuple[int, str]]:
    """Steps of checkpoints that are there, the best scored first, and why each stands there."""
    trend = probe_trend(probes, by)
    if trend is None:
        return []
    ranked = [point for point in trend.ranked() if point.step in there]
    return [
        (point.step, f"number {place} by probe score, {point.score:.1%} ({trend.words})")
        for place, point in enumerate(ranked, 1)
    ]


def _asked(table: Mapping[int, Mapping[tuple[str, str], object]]) -> set[tuple[str, str]]:
    """The largest set of tasks and heads that two checkpoints have, the newest of equals.

    The newest checkpoint may be half done, since its heads come one by one; and one that alone
    was given more heads than the others must not end the comparison. Without two, the largest.
    """
    sets = [set(table[step]) for step in sorted(table, reverse=True)]
    largest = sorted(sets, key=len, reverse=True)
    shared = (asked for asked in largest if sum(asked <= other for other in sets) > 1)
    return next(shared, largest[0])


def _is_wanted(probe: ProbeScore, by: str | None) -> bool:
    return by is None or by in (probe.task, f"{probe.task}/{probe.head}")


def _point(step: int, cells: Sequence[Sequence[ProbeScore]]) -> ScoredStep:
    means = [statistics.fmean(score.top1 for score in cell) for cell in cells]
    # Heads are scored on the same clips: their errors go together, so they are averaged, not
    # divided by the root of their number.
    errors = [
        math.sqrt(mean * (1 - mean) / cell[0].num_val) if cell[0].num_val else 0.0
        for mean, cell in zip(means, cells, strict=True)
    ]
    return ScoredStep(step=step, score=statistics.fmean(means), error=statistics.fmean(errors))
