"""Do the features still tell clips apart? A verdict on a run in plain words.

The loss of a moving-average method is only a proxy: its target moves. It can fall while the
features die, and rise while they grow richer. So the verdict looks at the features themselves.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.clip import StepReport
from pipeline.track.collapse import LIMITS, SMOOTH, Evidence, State, evidence, recent
from pipeline.track.loss_shape import loss_shape

WORSE: tuple[State, ...] = ("healthy", "watch", "collapsed")
"""From good to bad."""

# Enough measurements for every rule, few enough for a run of a million steps.
_KEPT = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """The verdict, and the reasons a person can follow."""

    state: State
    sentences: tuple[str, ...]
    evidence: tuple[Evidence, ...] = ()
    """Every signal that has a limit."""
    alarm: State = "healthy"
    """The state without the fall of the rank that nearly every healthy run begins with: one looks
    at that in the report, and nobody is called for it."""


def verdict(history: Sequence[StepReport]) -> Health:
    """Judges a run by its features, on the median of the last three measurements.

    Collapsed, if a signal is past its collapse limit. Watch, if one is past its warning limit; if
    within a stage the effective rank has lost more than half of its best, or of its start if it
    never rose; if updates are being skipped; or if there are fewer than three measurements.
    Healthy otherwise. The loss is explained in a sentence and never decides.

    Args:
        history: Steps in order; those without `health` count for the loss alone.
    """
    measured = [report for report in history if report.health]
    if not measured:
        return Health(
            state="watch",
            sentences=(
                "No features have been measured yet, so nothing can be said about collapse.",
            ),
        )
    found: list[tuple[State, str]] = [
        *_broken_limits(measured),
        *_lost_rank(measured),
        *_skipped(history),
        *_too_early(measured),
    ]
    alarm = _worst(found)
    found += _only_fell(measured)
    state = _worst(found)
    reasons = [sentence for _, sentence in sorted(found, key=lambda f: -WORSE.index(f[0]))]
    if state == "healthy":
        reasons = [_healthy_sentence(measured)]
    return Health(
        state=state,
        sentences=(*reasons, *_loss_sentence(history, measured, state)),
        evidence=evidence(measured),
        alarm=alarm,
    )


class HealthWatch:
    """Says when a live run's verdict gets worse; cheap, since it looks at measured steps alone."""

    def __init__(self) -> None:
        self._measured: deque[StepReport] = deque(maxlen=_KEPT)
        self._state: State = "watch"
        self._alarm: State = "watch"

    @property
    def state(self) -> State:
        """The newest verdict; to be watched until there are measurements enough."""
        return self._state

    def watch(self, report: StepReport) -> list[str]:
        """Takes in a step.

        Returns:
            What to raise an alarm with: the reasons, if features have just become worse.
        """
        if not report.health:
            return []
        self._measured.append(report)
        if len(self._measured) < SMOOTH:
            return []
        now = verdict(list(self._measured))
        was, self._state, self._alarm = self._alarm, now.state, now.alarm
        if WORSE.index(now.alarm) <= WORSE.index(was):
            return []
        return [f"the features went from {was} to {now.alarm}: {' '.join(now.sentences)}"]


def _worst(found: Sequence[tuple[State, str]]) -> State:
    return WORSE[max((WORSE.index(state) for state, _ in found), default=0)]


def _broken_limits(measured: Sequence[StepReport]) -> list[tuple[State, str]]:
    found: list[tuple[State, str]] = []
    for limit in LIMITS:
        value = recent(measured, limit.signal)
        if value is None:
            continue
        if math.isnan(value):
            found.append(("collapsed", f"The features are not finite ({limit.signal})."))
        elif limit.bad(value, limit.watch):
            collapsed = limit.bad(value, limit.collapsed)
            words = limit.meaning.format(value=value)
            sentence = f"{words[0].upper()}{words[1:]}."
            found.append(("collapsed" if collapsed else "watch", sentence))
    return found


def _lost_rank(measured: Sequence[StepReport]) -> list[tuple[State, str]]:
    smooth = _ranks_of_stage(measured)
    peak = _peak_since_turn(smooth) if smooth else None
    if peak is not None and smooth[-1] < smooth[peak] / 2:
        return [
            (
                "watch",
                f"The effective rank fell to {smooth[-1]:.1f} from a best of {smooth[peak]:.1f}: "
                "part of what was learned is being given up. If it goes on, resume from an earlier "
                "checkpoint with a lower learning rate or a higher teacher momentum.",
            )
        ]
    return []


def _only_fell(measured: Sequence[StepReport]) -> list[tuple[State, str]]:
    smooth = _ranks_of_stage(measured)
    if smooth and _peak_since_turn(smooth) is None and smooth[-1] < smooth[0] / 2:
        return [
            (
                "watch",
                f"The effective rank has only fallen so far, from {smooth[0]:.1f} to "
                f"{smooth[-1]:.1f}. "
                "Untrained features have a high rank that means nothing, so a fall at the start is "
                "usual; it should turn and rise.",
            )
        ]
    return []


def lost_peak(history: Sequence[StepReport]) -> int | None:
    """The step by which the newest stage's effective rank was best, if half of it is lost since."""
    measured = [r for r in history if r.health and "effective_rank" in r.health]
    stage = [report for report in measured if report.stage == measured[-1].stage]
    smooth = _smooth(_series(stage, "effective_rank"))
    peak = _peak_since_turn(smooth) if smooth else None
    if peak is None or smooth[-1] >= smooth[peak] / 2:
        return None
    return stage[peak + SMOOTH - 1].step


def _ranks_of_stage(measured: Sequence[StepReport]) -> list[float]:
    """Smooth ranks of the newest stage: another has other clips, and ranks do not compare."""
    stage = measured[-1].stage
    return _smooth(_series([r for r in measured if r.stage == stage], "effective_rank"))


def _smooth(values: Sequence[float]) -> list[float]:
    return [statistics.median(values[i : i + SMOOTH]) for i in range(len(values) - SMOOTH + 1)]


def _peak_since_turn(smooth: Sequence[float]) -> int | None:
    """Where the rank was highest since it first rose by a seventh from a low; None while it falls.

    The last of equally high ones: up to it nothing was lost.
    """
    low, peak = smooth[0], None
    for number, value in enumerate(smooth):
        low = min(low, value)
        if peak is not None or value > 1.15 * low:
            peak = number if peak is None or value >= smooth[peak] else peak
    return peak


def _skipped(history: Sequence[StepReport]) -> list[tuple[State, str]]:
    recent = history[-100:]
    skipped = sum(report.skipped for report in recent)
    if skipped * 20 <= len(recent):
        return []
    return [
        (
            "watch",
            f"{skipped} of the last {len(recent)} updates were left out because the loss or "
            "gradient was not finite.",
        )
    ]


def _too_early(measured: Sequence[StepReport]) -> list[tuple[State, str]]:
    if len(measured) >= SMOOTH:
        return []
    times = "once" if len(measured) == 1 else "twice"
    return [("watch", f"Features have been measured only {times}: too early to tell.")]


def _healthy_sentence(measured: Sequence[StepReport]) -> str:
    parts: list[str] = []
    rank, spread = recent(measured, "effective_rank"), recent(measured, "feature_std")
    stage = [report for report in measured if report.stage == measured[-1].stage]
    ranks = _series(stage, "effective_rank")
    if rank is not None and ranks:
        parts.append(f"effective rank {rank:.1f} ({ranks[0]:.1f} at the start of this stage)")
    if spread is not None:
        parts.append(f"spread {spread:.2f}")
    return f"The features stay diverse: {', '.join(parts)}."


def _loss_sentence(
    history: Sequence[StepReport], measured: Sequence[StepReport], state: State
) -> tuple[str, ...]:
    shape = loss_shape(history)
    ranks = _series([r for r in measured if r.stage == measured[-1].stage], "effective_rank")
    grew = " while the rank grew" if len(ranks) > 1 and ranks[-1] > ranks[0] else ""
    move = f"from {shape.first:.3g} to {shape.last:.3g}"
    end = "."
    if state == "healthy" and grew:
        end = (
            "; that is normal here, since the teacher's features are the target and become harder "
            "to guess as they grow richer."
        )
    elif state == "healthy":
        end = "; by itself that says little, since the target moves with the teacher."
    told = {
        "not finite": "The loss is not finite.",
        "falling": f"The loss fell {move}; that alone proves nothing, only a probe does.",
        "flat": f"The loss stands still at {shape.last:.3g}; look at probes for progress.",
        "rising": f"The loss rose {move}{grew}{end}",
        "turned": f"The loss fell to {shape.lowest:.3g} by step {shape.turn_step}, then rose to "
        f"{shape.last:.3g}{grew}{end}",
        "jumped": f"The loss jumped to {shape.last:.3g} at step {shape.turn_step} and stayed "
        f"there{grew}: "
        + (
            "the features are well, so watch the probes."
            if state == "healthy"
            else "something broke there; see what changed at that step."
        ),
    }
    return (told[shape.kind],) if shape.kind in told else ()


def _series(measured: Sequence[StepReport], signal: str) -> list[float]:
    values = [
        report.health[signal] for report in measured if report.health and signal in report.health
    ]
    return [value for value in values if math.isfinite(value)]
