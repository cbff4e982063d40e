"""What probes say: is the trained encoder better than the untrained one, and by how much."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.track.folder import ProbeScore


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One checkpoint's score with one head on one task, over all seeds."""

    step: int
    top1: float
    """Mean over seeds."""
    spread: float
    """Standard deviation over seeds; 0 with one."""
    num_seeds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A head on a task: the untrained encoder beside the newest trained one."""

    task: str
    head: str
    chance: float | None
    num_val: int | None
    untrained: Point | None
    trained: tuple[Point, ...]
    """By rising step."""

    @property
    def newest(self) -> Point | None:
        """The newest trained checkpoint's score."""
        return self.trained[-1] if self.trained else None

    @property
    def gain(self) -> float | None:
        """Accuracy above the untrained encoder's, as a share; None without both."""
        if self.newest is None or self.untrained is None:
            return None
        return self.newest.top1 - self.untrained.top1

    @property
    def is_clear(self) -> bool:
        """True if the gain is more than two standard errors of so many validation clips."""
        if self.gain is None or self.newest is None or self.untrained is None or not self.num_val:
            return False
        shares = (self.newest.top1, self.untrained.top1)
        variance = sum(share * (1 - share) / self.num_val for share in shares)
        # One clip either way is never clear, even where both shares are 0 or 1.
        return abs(self.gain) > max(2 * math.sqrt(variance), 1.5 / self.num_val)


def compare(scores: Sequence[ProbeScore]) -> list[Comparison]:
    """Groups scores by task and head, in the order in which they were first seen."""
    keys = list(dict.fromkeys((score.task, score.head) for score in scores))
    return [_comparison([s for s in scores if (s.task, s.head) == key]) for key in keys]


def learning_sentence(comparisons: Sequence[Comparison]) -> str:
    """The strongest statement that the probes allow, in plain words."""
    both = [comparison for comparison in comparisons if comparison.gain is not None]
    if not both:
        return (
            "No probe has compared the trained with the untrained encoder yet, so what was learned "
            "has not been shown."
        )
    best = max(both, key=lambda c: (c.is_clear, c.gain or 0.0))
    newest, untrained = best.newest, best.untrained
    if newest is None or untrained is None:
        raise RuntimeError("a comparison with a gain has both of its sides")
    which = f", the best of {len(both)} probes," if len(both) > 1 else ""
    told = (
        f"On {best.task}, the {best.head} probe{which} scores {100 * newest.top1:.1f} % with the "
        f"encoder of step {newest.step} and {100 * untrained.top1:.1f} % with the untrained one"
    )
    chance = "" if best.chance is None else f" (chance {100 * best.chance:.1f} %)"
    if best.is_clear and (best.gain or 0.0) > 0:
        return f"{told}{chance}: it has learned something that was not there before."
    if best.is_clear:
        return f"{told}{chance}: training has made these features worse for this task."
    return (
        f"{told}{chance}: with {best.num_val or 'so few'} validation clips that difference is "
        "within what luck can do."
    )


def _comparison(scores: Sequence[ProbeScore]) -> Comparison:
    untrained = [score for score in scores if not score.trained]
    steps = sorted({score.step or 0 for score in scores if score.trained})
    return Comparison(
        task=scores[0].task,
        head=scores[0].head,
        chance=scores[0].chance,
        num_val=scores[0].num_val,
        untrained=_point(untrained, 0) if untrained else None,
        trained=tuple(
            _point([s for s in scores if s.trained and (s.step or 0) == step], step)
            for step in steps
        ),
    )


def _point(scores: Sequence[ProbeScore], step: int) -> Point:
    values = [score.top1 for score in scores]
    return Point(
        step=step,
        top1=statistics.fmean(values),
        spread=statistics.stdev(values) if len(values) > 1 else 0.0,
        num_seeds=len(values),
    )
