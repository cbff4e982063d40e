"""Where a run's time went: every second from its first start to its last sign of life, once.

Steps that a later resume took again are lost; what lies between a death and the next start is
down. The ledger is read from metrics.jsonl and events.jsonl alone, so it survives a kill.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.track.faults import read_faults, with_faults
from pipeline.track.folder import start_times
from pipeline.track.metrics import (
    Event,
    LoggedStep,
    read_all_metrics,
    read_events,
    without_superseded,
)

_STARTS = ("start", "resume")
_KINDS = ("training", "wait", "starting", "saving", "lost", "other")
# Events that say why an attempt ended, the most telling first.
_ENDINGS = ("fault", "stop", "end")
# Their `seconds` are those for which the loop stood still: for a copy, or for a save before it.
_SAVES = ("save_begun", "save", "save_failed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One life of the training processes: from a start or resume to its last sign of life."""

    begin: float
    end: float
    first_step: int | None
    last_step: int | None
    ending: str
    """Why it ended, in words; `died without a word` if nothing was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Seconds by what they were spent on; they sum to `wall_seconds`."""

    wall_seconds: float
    training_seconds: float
    """Computing steps that count."""
    data_wait_seconds: float
    """Waiting for the loader in steps that count."""
    starting_seconds: float
    """From a start to its first step."""
    saving_seconds: float
    """Training stood still for a checkpoint."""
    lost_seconds: float
    """Steps that a resume had to take again, with the gaps among them."""
    down_seconds: float
    """Between the end of one attempt and the start of the next."""
    other_seconds: float
    """Gaps between steps that nothing explains, and what follows the last step."""
    init_seconds: float
    """The part of starting before data and networks: imports, and meeting the other ranks."""
    attempts: tuple[Attempt, ...]

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase of the run; they add up to `wall_seconds`."""
        return {
            "init": self.init_seconds,
            "load": self.starting_seconds - self.init_seconds,
            "step": self.training_seconds,
            "stall": self.data_wait_seconds + self.other_seconds,
            "save": self.saving_seconds,
            "lost": self.lost_seconds,
            "down": self.down_seconds,
        }

    @property
    def effective_share(self) -> float:
        """Part of the wall time that went into computing steps that count."""
        return self.training_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0


def time_ledger(
    steps: Sequence[LoggedStep], events: Sequence[Event], starts: Sequence[float] = ()
) -> Ledger | None:
    """Divides the time between the run's first and last sign of life.

    Args:
        steps: All steps in the order of time, superseded ones included (`read_all_metrics`).
        events: All events in the order of time.
        starts: When the processes were started, from run.json: seconds before the `start` event,
            which comes when everything is loaded.

    Returns:
        The ledger; None if the run has left no sign of life.
    """
    lives = _lives(steps, events, starts)
    if not lives:
        return None
    kept = {id(step) for step in without_superseded(steps)}
    spent: dict[str, float] = dict.fromkeys((*_KINDS, "init"), 0.0)
    for life in lives:
        _spend(life, kept, spent)
    down = sum(later.begin - earlier.end for earlier, later in pairwise(lives))
    return Ledger(
        wall_seconds=lives[-1].end - lives[0].begin,
        training_seconds=spent["training"],
        data_wait_seconds=spent["wait"],
        starting_seconds=spent["starting"],
        saving_seconds=spent["saving"],
        lost_seconds=spent["lost"],
        down_seconds=down,
        other_seconds=spent["other"],
        init_seconds=spent["init"],
        attempts=tuple(_attempt(life, is_last=life is lives[-1]) for life in lives),
    )


def run_ledger(run_dir: Path) -> Ledger | None:
    """The ledger of a run's folder, the last words of all its processes included."""
    events = with_faults(read_events(run_dir), read_faults(run_dir))
    return time_ledger(read_all_metrics(run_dir), events, start_times(run_dir))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Life:
    begin: float
    end: float
    steps: tuple[LoggedStep, ...]
    events: tuple[Event, ...]


def _lives(
    steps: Sequence[LoggedStep], events: Sequence[Event], starts: Sequence[float]
) -> list[_Life]:
    """Cuts both records at every start; a run without events is one life."""
    begins = _begins([event.time for event in events if event.name in _STARTS], starts)
    signs = [step.time for step in steps] + [event.time for event in events]
    if not signs:
        return []
    if not begins or min(signs) < begins[0]:
        first = min((s.time - s.report.step_seconds for s in steps), default=min(signs))
        begins.insert(0, min(first, *signs))
    step_times, event_times = [step.time for step in steps], [event.time for event in events]
    lives: list[_Life] = []
    for begin, limit in pairwise([*begins, float("inf")]):
        own_steps = tuple(steps[bisect_right(step_times, begin) : bisect_right(step_times, limit)])
        own_events = tuple(
            events[bisect_left(event_times, begin) : bisect_left(event_times, limit)]
        )
        end = max([begin, *(s.time for s in own_steps), *(e.time for e in own_events)])
        lives.append(_Life(begin=begin, end=end, steps=own_steps, events=own_events))
    return lives


def _begins(event_times: Sequence[float], starts: Sequence[float]) -> list[float]:
    """One time per attempt: when its processes started, or its start event if that is unknown."""
    begins = sorted(starts)
    before = float("-inf")
    for time in event_times:
        if bisect_right(begins, time) == bisect_right(begins, before):
            insort(begins, time)
        before = time
    return begins


def _spend(life: _Life, kept: set[int], spent: dict[str, float]) -> None:
    """Walks one life from sign to sign and books each stretch."""
    saves = [event for event in life.events if event.name in _SAVES]
    before = spent["starting"]
    clock = life.begin
    for number, step in enumerate(life.steps):
        gap = max(0.0, step.time - clock)
        steps_covered = 1 if number == 0 else step.report.step - life.steps[number - 1].report.step
        inside = min(gap, step.report.step_seconds * max(1, steps_covered))
        saving = min(gap - inside, _save_seconds(saves, clock, step.time))
        rest = gap - inside - saving
        is_lost = id(step) not in kept
        spent["saving"] += saving
        if is_lost:
            spent["lost"] += inside
        else:
            _book_step(step, inside, spent)
        gap_is_for = "starting" if number == 0 else "lost" if is_lost else "other"
        spent[gap_is_for] += rest
        clock = max(clock, step.time)
    tail = life.end - clock
    saving = min(tail, _save_seconds(saves, clock, life.end + 1e-9))
    spent["saving"] += saving
    spent["other" if life.steps else "starting"] += tail - saving
    spent["init"] += min(spent["starting"] - before, _init_seconds(life))


def _init_seconds(life: _Life) -> float:
    told = (event.details.get("start_up_seconds") for event in life.events if event.name in _STARTS)
    phases = next((one for one in told if isinstance(one, dict)), {})
    return float(phases.get("imports", 0.0)) + float(phases.get("meeting", 0.0))


def _book_step(step: LoggedStep, inside: float, spent: dict[str, float]) -> None:
    report = step.report
    share = report.data_wait_seconds / report.step_seconds if report.step_seconds > 0 else 0.0
    waited = inside * min(1.0, max(0.0, share))
    spent["wait"] += waited
    spent["training"] += inside - waited


def _save_seconds(saves: Sequence[Event], after: float, before: float) -> float:
    """Seconds for which the loop stood still for saves that ended in this stretch."""
    inside = [event for event in saves if after < event.time <= before]
    return sum(float(event.details.get("seconds", 0.0)) for event in inside)


def _attempt(life: _Life, *, is_last: bool) -> Attempt:
    numbers = [step.report.step for step in life.steps]
    return Attempt(
        begin=life.begin,
        end=life.end,
        first_step=numbers[0] if numbers else None,
        last_step=numbers[-1] if numbers else None,
        ending=_ending(life, is_last=is_last),
    )


def _ending(life: _Life, *, is_last: bool) -> str:
    for name in _ENDINGS:
        for event in reversed(life.events):
            if event.name == name:
                why = event.details.get("reason") or event.details.get("message")
                words = {"fault": "failed", "stop": "stopped", "end": "finished"}[name]
                return f"{words}: {why}" if why else words
    return "no word yet" if is_last else "died without a word"
