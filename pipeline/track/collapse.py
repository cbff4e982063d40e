"""Which signals show a collapse, and how far each may go: the one place for these numbers.

Limits are those at which runs of this method were seen to go wrong; objectives' gates and the
verdict of `health` both take them from here.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.clip import StepReport

State = Literal["healthy", "watch", "collapsed"]

FEATURE_STD_HEALTHY = 0.1
"""Spread of features above which they tell clips apart."""
SMOOTH = 3
"""One odd batch must not change the verdict: it is taken on the median of so many measurements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One signal as it stands, so that nobody has to believe a sentence."""

    signal: str
    value: float
    healthy: str
    """The limit in words, such as `above 0.1`."""
    state: State
    since_step: int
    """The first measured step from which on it has been so without a break."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limit:
    """One rule: how a signal is judged and what it means in words."""

    signal: str
    bad: Callable[[float, float], bool]
    """Compares (value, limit)."""
    watch: float
    collapsed: float
    meaning: str


def _below(value: float, limit: float) -> bool:
    return value < limit


def _above(value: float, limit: float) -> bool:
    return value > limit


LIMITS = (
    _Limit(
        signal="feature_std",
        bad=_below,
        watch=FEATURE_STD_HEALTHY,
        collapsed=0.05,
        meaning="the features hardly differ from one place or clip to another (spread {value:.3f}, "
        "healthy is above 0.1)",
    ),
    _Limit(
        signal="effective_rank",
        bad=_below,
        watch=3.0,
        collapsed=1.5,
        meaning="nearly all features lie along one direction (effective rank {value:.1f}, healthy "
        "is above 3 and not falling)",
    ),
    _Limit(
        signal="clip_cosine",
        bad=_above,
        watch=0.99,
        collapsed=0.999,
        meaning="different clips get nearly the same features (cosine similarity {value:.4f}, "
        "healthy is below 0.99)",
    ),
    _Limit(
        signal="between_clip_share",
        bad=_below,
        watch=0.1,
        collapsed=0.01,
        meaning="the features say where a token stands rather than what the video shows "
        "({value:.1%} of their variance is between clips, healthy is above 10 %)",
    ),
)


def recent(measured: Sequence[StepReport], signal: str) -> float | None:
    """The median of a signal's newest values; NaN if the last one is."""
    values = [
        report.health[signal] for report in measured if report.health and signal in report.health
    ]
    last = values[-SMOOTH:]
    if not last:
        return None
    return math.nan if math.isnan(last[-1]) else statistics.median(last)


def evidence(measured: Sequence[StepReport]) -> tuple[Evidence, ...]:
    """Every signal that has a limit, as it stands in the newest measurements."""
    found = []
    for limit in LIMITS:
        value = recent(measured, limit.signal)
        if value is not None:
            found.append(
                Evidence(
                    signal=limit.signal,
                    value=value,
                    healthy=f"{'above' if limit.bad is _below else 'below'} {limit.watch:g}",
                    state=_state_of(limit, value),
                    since_step=_since(limit, measured),
                )
            )
    return tuple(found)


def _state_of(limit: _Limit, value: float) -> State:
    if math.isnan(value) or limit.bad(value, limit.collapsed):
        return "collapsed"
    return "watch" if limit.bad(value, limit.watch) else "healthy"


def _since(limit: _Limit, measured: Sequence[StepReport]) -> int:
    known = [
        (report.step, report.health[limit.signal])
        for report in measured
        if report.health and limit.signal in report.health
    ]
    state, since = _state_of(limit, known[-1][1]), known[-1][0]
    for step, value in reversed(known):
        if _state_of(limit, value) != state:
            break
        since = step
    return since
