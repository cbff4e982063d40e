"""What the loss did, in one word and in steps: fell, rose, turned, jumped, stood still.

Judged within a stage: with other clips, or larger ones, the loss is another number. Nothing here
says whether that is good: the target of this method moves, so only features and probes can.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from pipeline.clip import StepReport

Kind = Literal["unknown", "falling", "rising", "turned", "flat", "jumped", "not finite"]

_FEWEST = 10
_MOST_WINDOWS = 10
_WINDOW_STEPS = 5
# A jump is more than a quarter of the level and six times the noise, and does not come back.
_JUMP_SHARE, _JUMP_NOISE = 0.25, 6.0
# A turn is more than a fiftieth of the lowest level and three times what medians scatter by.
_TURN_SHARE, _TURN_NOISE = 0.02, 3.0
# Less than this is no movement, however quiet the loss.
_STILL_SHARE = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class LossShape:
    """The loss of the newest stage that is long enough to tell."""

    kind: Kind
    first: float = math.nan
    """Level after the first steps, which fall for trivial reasons."""
    last: float = math.nan
    lowest: float = math.nan
    turn_step: int | None = None
    """Where it was lowest before it rose, or jumped."""


def loss_shape(history: Sequence[StepReport]) -> LossShape:
    """The shape of a loss.

    Args:
        history: Steps in order.
    """
    if len(history) >= _FEWEST and not any(math.isfinite(r.loss) for r in history[-3:]):
        return LossShape(kind="not finite")
    reports = _newest_stage([report for report in history if math.isfinite(report.loss)])
    if len(reports) < _FEWEST:
        return LossShape(kind="unknown")
    windows = _windows(reports)
    levels = [statistics.median(report.loss for report in window) for window in windows]
    noise = _noise(windows, levels)
    # The window after the first, where there are enough of them.
    first = levels[1] if len(levels) > 3 else levels[0]
    found = LossShape(kind="flat", first=first, last=levels[-1], lowest=min(levels))
    jump = _jump(levels, noise)
    if jump is not None:
        around = [*windows[jump], *windows[jump + 1]]
        return replace(found, kind="jumped", turn_step=_jump_step(around))
    scatter = _TURN_NOISE * 1.25 * noise / math.sqrt(len(reports) / len(windows))
    margin = max(_TURN_SHARE * abs(min(levels)), scatter)
    still = max(_STILL_SHARE * abs(min(levels)), scatter)
    lowest = levels.index(min(levels))
    is_inside = levels.index(first) < lowest < len(levels) - 1
    if is_inside and min(first, levels[-1]) - levels[lowest] > margin:
        step = windows[lowest][len(windows[lowest]) // 2].step
        return replace(found, kind="turned", turn_step=step)
    return replace(found, kind=_trend(first, levels[-1], still))


def _trend(first: float, last: float, still: float) -> Kind:
    if abs(last - first) <= still:
        return "flat"
    return "falling" if last < first else "rising"


def _newest_stage(reports: Sequence[StepReport]) -> list[StepReport]:
    """Of the newest stage that has enough steps, or of the newest if none has."""
    stages = list(dict.fromkeys(report.stage for report in reports))
    for stage in reversed(stages):
        found = [report for report in reports if report.stage == stage]
        if len(found) >= _FEWEST:
            return found
    return []


def _windows(reports: Sequence[StepReport]) -> list[Sequence[StepReport]]:
    count = max(2, min(_MOST_WINDOWS, len(reports) // _WINDOW_STEPS))
    edges = [round(number * len(reports) / count) for number in range(count + 1)]
    return [reports[edges[i] : edges[i + 1]] for i in range(count)]


def _noise(windows: Sequence[Sequence[StepReport]], levels: Sequence[float]) -> float:
    """Scatter of single steps, without the trend within a window."""
    apart = [
        abs(later.loss - earlier.loss) for window in windows for earlier, later in pairwise(window)
    ]
    # 1.4826: from the median of absolute values to a standard deviation; √2: of a difference.
    return 1.4826 * statistics.median(apart) / math.sqrt(2) if apart else abs(levels[0])


def _jump(levels: Sequence[float], noise: float) -> int | None:
    """The window after which the level jumped up for good."""
    found = None
    for number, (before, after) in enumerate(pairwise(levels)):
        height = after - before
        if height <= max(_JUMP_SHARE * abs(before), _JUMP_NOISE * noise):
            continue
        # A ramp has no jump: its neighbours climb as well.
        neighbours = [*levels[max(0, number - 1) : number + 1], *levels[number + 1 : number + 3]]
        steps = [abs(b - a) for a, b in pairwise(neighbours)]
        is_sudden = height > 0.6 * sum(steps)
        if is_sudden and min(levels[number + 1 :]) > before + height / 2:
            found = number
    return found


def _jump_step(around: Sequence[StepReport]) -> int:
    """The first step of the higher level."""
    losses = [report.loss for report in around]
    width = max(2, len(losses) // 6)
    heights = {
        i: statistics.median(losses[i : i + width]) - statistics.median(losses[i - width : i])
        for i in range(width, len(losses) - width + 1)
    }
    return around[max(heights, key=lambda i: heights[i])].step
