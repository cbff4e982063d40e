"""Is the run healthy, and which checkpoint to keep? In plain words, with the evidence.

A pure function of what the run recorded, of its probes' scores, and of what verifying found in its
checkpoints. `track.health` judges the features; here the teacher, the loss and the probes join it,
and a step is chosen: by probes where there are any, else by the features.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.clip import StepReport
from pipeline.track.collapse import State
from pipeline.track.folder import ProbeScore
from pipeline.track.health import WORSE, Health, lost_peak, verdict
from pipeline.track.loss_shape import loss_shape
from pipeline.track.probe_trend import ProbeTrend, probe_trend

_TODO: dict[State, str] = {
    "healthy": "Go on.",
    "watch": "Go on, and look again after the next checkpoints.",
    "collapsed": "Stop the run and take it up from the step below with a lower learning rate or a "
    "higher teacher momentum: going on does not mend a collapse.",
}
# So much further than before is no longer following.
_RUN_AWAY = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """The checkpoint to keep, to cool down from, or to take the run up from."""

    step: int | None
    """None if there is none to choose."""
    reasons: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The choice and its reasons."""
        told = "; ".join(self.reasons)
        return (
            f"No step to keep: {told}." if self.step is None else f"Keep step {self.step}: {told}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How the run is, why, what to do, and which step to keep."""

    state: State
    sentences: tuple[str, ...]
    """The most telling first."""
    todo: str
    keep: Keep

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join([*self.sentences, self.todo, self.keep.sentence])


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """What is known of a run's checkpoints."""

    steps: Sequence[int] = ()
    """Of those that are there, rising."""
    damaged: Mapping[int, str] | None = None
    teacher_distances: Mapping[int, float] | None = None
    """Step → |teacher − student| / |student|."""


def judge(
    history: Sequence[StepReport],
    probes: Sequence[ProbeScore] = (),
    checkpoints: Checkpoints | None = None,
    *,
    health: Health | None = None,
) -> Verdict:
    """Judges a run.

    Args:
        history: Steps in order.
        probes: All scores.
        checkpoints: What is there, and what was found in it.
        health: Of the same history, where it is known already.
    """
    there = checkpoints or Checkpoints()
    health = health or verdict(history)
    trend = probe_trend(probes)
    found: list[tuple[State, str]] = [
        *_of_teacher(there.teacher_distances or {}),
        *_of_probes(trend),
        *_of_damage(there),
    ]
    worst = max((WORSE.index(state) for state, _ in found), default=0)
    state = WORSE[max(worst, WORSE.index(health.state))]
    told = [sentence for _, sentence in sorted(found, key=lambda one: -WORSE.index(one[0]))]
    return Verdict(
        state=state,
        sentences=(*health.sentences, *told),
        todo=_TODO[state],
        keep=_keep(history, health, trend, there),
    )


def _of_teacher(distances: Mapping[int, float]) -> list[tuple[State, str]]:
    trained = [(step, value) for step, value in sorted(distances.items()) if step > 0]
    if not trained:
        return []
    step, last = trained[-1]
    if last == 0.0:
        told = f"The teacher of step {step} is the student itself: its target is no average."
        return [("watch", told)]
    before = [value for _, value in trained[:-1]]
    move = f"{last:.2%} of the student's size away at step {step}"
    if len(before) >= 2 and last > _RUN_AWAY * statistics.median(before):
        return [
            (
                "watch",
                f"The student runs away from its teacher: {move}, {statistics.median(before):.2%} "
                "before. The learning rate, or the teacher's momentum, is too high.",
            )
        ]
    since = f", {before[-1]:.2%} at step {trained[-2][0]}" if before else ""
    return [("healthy", f"The teacher follows the student: {move}{since}.")]


def _of_probes(trend: ProbeTrend | None) -> list[tuple[State, str]]:
    if trend is None or len(trend.points) < 2:
        return []
    best, newest = trend.best, trend.newest
    if trend.is_clearly_below(newest, best):
        return [
            (
                "watch",
                f"Probe scores fell: {newest.score:.1%} at step {newest.step} after "
                f"{best.score:.1%} at step {best.step} ({trend.words}).",
            )
        ]
    first = trend.points[0]
    if trend.is_clearly_below(first, newest):
        told = f"Probe scores rise: {first.score:.1%} at step {first.step}, {newest.score:.1%} at "
        return [("healthy", f"{told}step {newest.step} ({trend.words}).")]
    told = f"Probe scores stand still within their luck since step {first.step}: {newest.score:.1%}"
    return [("healthy", f"{told} ({trend.words}).")]


def _of_damage(there: Checkpoints) -> list[tuple[State, str]]:
    damaged = {step: why for step, why in (there.damaged or {}).items() if step in there.steps}
    if not damaged:
        return []
    told = "; ".join(f"step {step}: {why}" for step, why in sorted(damaged.items()))
    return [("watch", f"Damaged checkpoints, {told}.")]


def _keep(
    history: Sequence[StepReport], health: Health, trend: ProbeTrend | None, there: Checkpoints
) -> Keep:
    whole = [step for step in there.steps if step not in (there.damaged or {})]
    if not whole:
        return Keep(step=None, reasons=("there is no whole checkpoint",))
    scored = [] if trend is None else [p for p in trend.points if p.step in whole]
    if trend is not None and scored:
        return _by_probes(trend, whole)
    limit, reason = _good_until(history, health)
    if limit is None:
        told = "it is the newest" if len(whole) > 1 else "it is the only one"
        return Keep(step=whole[-1], reasons=(told, reason))
    good = [step for step in whole if step <= limit]
    if not good:
        return Keep(step=whole[0], reasons=(reason, "no older checkpoint is left than this one"))
    return Keep(step=good[-1], reasons=(reason, f"it is the newest one up to step {limit}"))


def _by_probes(trend: ProbeTrend, whole: Sequence[int]) -> Keep:
    there = [point for point in trend.points if point.step in whole]
    best, newest = max(there, key=lambda point: (point.score, point.step)), there[-1]
    later = [step for step in whole if step > newest.step]
    unprobed = [f"not probed yet: {', '.join(map(str, later))}"] if later else []
    gone = []
    if trend.is_clearly_below(best, trend.best):
        gone = [f"step {trend.best.step} scored {trend.best.score:.1%} but is no longer there"]
    if newest is not best and not trend.is_clearly_below(newest, best):
        told = (
            f"its probes score {newest.score:.1%}, the best is {best.score:.1%} at step "
            f"{best.step}: within luck, and this one has learned for longer"
        )
        return Keep(step=newest.step, reasons=(told, *gone, *unprobed))
    others = [point for point in there if point is not best]
    if not others:
        told = f"it is the only one with probe scores, {best.score:.1%} ({trend.words})"
        return Keep(step=best.step, reasons=(told, *gone, *unprobed))
    than = f", {others[-1].score:.1%} at step {others[-1].step}"
    told = f"its probes score best, {best.score:.1%}{than} ({trend.words})"
    return Keep(step=best.step, reasons=(told, *gone, *unprobed))


def _good_until(history: Sequence[StepReport], health: Health) -> tuple[int | None, str]:
    """The last step at which the features were well, if they no longer are, and what tells so."""
    bad = [one for one in health.evidence if one.state != "healthy"]
    if bad:
        first = min(bad, key=lambda one: one.since_step)
        told = f"since step {first.since_step} {first.signal} is no longer {first.healthy}"
        return max(0, first.since_step - 1), told
    peak = lost_peak(history)
    if peak is not None:
        return peak, f"the effective rank was highest at step {peak} and has halved since"
    shape = loss_shape(history)
    if shape.kind == "jumped" and shape.turn_step is not None and health.state != "healthy":
        return shape.turn_step - 1, f"the loss jumped at step {shape.turn_step}"
    if health.state == "healthy":
        return None, "the features are healthy, and no probe has compared checkpoints yet"
    return None, "nothing speaks against it, and no probe has compared checkpoints yet"
