"""A run that is killed again and again and started again by the same command until it ends.

Two lanes of one seed: the undisturbed run says what the losses have to be, bit for bit. From the
disturbed one follows what the faults cost: time to the first step after a restart, steps lost, and
the share of the time that went into steps that count, beside what the interval model predicts.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from pipeline.errors import ExitCode
from pipeline.track.folder import start_times
from pipeline.track.ledger import time_ledger
from pipeline.track.metrics import Event, LoggedStep, read_all_metrics, read_events
from tests.faults.harness import PHASES, Fault, Outcome, Run
from tests.shards import write_dataset

SAVE_EVERY = 4
# The save before the last one is published by then, so every life gets on.
STEPS_PER_LIFE = 3 * SAVE_EVERY
# One failure in 2.8 hours is what a run of 16,384 GPUs met (the Llama 3 report).
PROJECTED_HOURS = 2.8
_MAX_IDLE_STARTS = 3
_KINDS = ("training", "data_wait", "starting", "saving", "lost", "down", "other", "wall")


@dataclass(frozen=True, kw_only=True, slots=True)
class StormReport:
    """What was done to the run, and what it cost."""

    faults: dict[str, int]
    """By deed and phase."""
    starts: int
    same_losses: bool
    unexpected: tuple[str, ...]
    """Exit codes that a fault must not give, with the end of what was printed."""
    max_steps_lost: int
    save_every: int
    cold_start_seconds: float
    """From the command to the first step of a fresh run: the median of three."""
    resume_seconds: float
    """From the command to the first step after a restart: the median."""
    effective_share: float
    predicted_share: float
    projected_share: float
    """By the same model at one failure in 2.8 hours, with this run's stall and restart: a
    projection, not a measurement."""
    stall_seconds: float
    wall_seconds: float
    spent_seconds: dict[str, float]
    """The run's own ledger."""


def run(num_faults: int, folder: Path, *, seed: int = 1) -> StormReport:
    """Does at least `num_faults` faults to a run and lets it end."""
    write_dataset(folder / "data", 24)
    draw = random.Random(seed)
    # Every second fault ends the process; a life of a few steps lies between.
    steps = STEPS_PER_LIFE * (num_faults // 2 + 2)
    settings = {"steps": steps, "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 2}}
    calm, hurt = Run(folder, "calm", **settings), Run(folder, "hurt", **settings)
    cold = [_cold_start(calm)]
    log = _Log()
    while log.num_faults < num_faults:
        log.note(hurt, _faults(draw, hurt))
    log.note(hurt, ())
    # Before, at the beginning of and after the storm, so that a machine's moods weigh less.
    cold.append(_begin(read_all_metrics(hurt.path)[0]) - log.begins[0])
    cold.append(_cold_start(Run(folder, "late", **{**settings, "steps": 2})))
    return _report(calm, hurt, log, median(cold))


def _cold_start(run: Run) -> float:
    """Lets a fresh run go to its end; seconds from the command to its first step."""
    begin = time.time()
    outcome = run.attempt()
    if outcome.code != ExitCode.DONE:
        raise RuntimeError(f"an undisturbed run ended with {outcome.code}: {outcome.output}")
    return _begin(read_all_metrics(run.path)[0]) - begin


class _Log:
    """Every start of the disturbed run."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.begins: list[float] = []
        self.lost: list[int] = []
        self.idle = 0

    @property
    def num_faults(self) -> int:
        return self.faults.total()

    def note(self, run: Run, faults: tuple[Fault, ...]) -> None:
        """Starts the run once and writes down what came of it."""
        before = _last_step(run)
        self.begins.append(time.time())
        outcome = run.attempt(*faults)
        self.faults.update(f"{fault.deed} in {fault.phase}" for fault in faults)
        if len(self.begins) > 1:
            self.lost.append(before - _first_step_since(run, self.begins[-1], before) + 1)
        if not _is_expected(outcome, faults):
            self.unexpected.append(f"{outcome.code} after {faults}: {outcome.output[-500:]}")
        self.idle = self.idle + 1 if _last_step(run) <= before else 0
        if self.idle >= _MAX_IDLE_STARTS:
            raise RuntimeError(f"no progress in {self.idle} starts: {outcome.output[-2000:]}")


def _faults(draw: random.Random, run: Run) -> tuple[Fault, ...]:
    """One worker killed, then the process killed, in phases and at steps drawn by the seed."""
    begin = (run.commits() or [0])[-1]
    worker = Fault(phase="log", step=begin + draw.randint(1, 2), deed="kill_worker")
    step = begin + STEPS_PER_LIFE - draw.randint(0, SAVE_EVERY - 1)
    if draw.random() < 0.15:
        return worker, Fault(phase="forward", step=step, deed="send:SIGTERM")
    return worker, Fault(phase=draw.choice(PHASES), step=step)


def _is_expected(outcome: Outcome, faults: tuple[Fault, ...]) -> bool:
    deeds = [fault.deed for fault in faults]
    if "send:SIGTERM" in deeds:
        return outcome.code == ExitCode.SAVED_RUN_AGAIN
    return outcome.code == (-9 if "kill" in deeds else ExitCode.DONE)


def _last_step(run: Run) -> int:
    return max(run.steps(), default=0) if (run.path / "metrics.jsonl").exists() else 0


def _first_step_since(run: Run, begin: float, otherwise: int) -> int:
    later = [s.report.step for s in read_all_metrics(run.path) if s.time > begin]
    return later[0] if later else otherwise + 1


def _report(calm: Run, hurt: Run, log: _Log, cold_seconds: float) -> StormReport:
    steps, events = read_all_metrics(hurt.path), read_events(hurt.path)
    ledger = time_ledger(steps, events, start_times(hurt.path))
    if ledger is None:
        raise RuntimeError(f"{hurt.path} has left no sign of life")
    # The model begins with the first step and ends with the last.
    wall = steps[-1].time - _begin(steps[0])
    gaps = _gaps(steps, events, log.begins)
    resumes = [_begin(first) - begin for first, begin in _firsts(steps, log.begins[1:])]
    # Copying, and waiting for the save before it where that had not ended.
    stalls = [e.details["seconds"] for e in events if e.name in ("save", "save_begun")]
    stall = sum(stalls) / sum(event.name == "save_begun" for event in events)
    effective = ledger.training_seconds + ledger.data_wait_seconds
    interval = SAVE_EVERY * effective / len(hurt.steps())
    return StormReport(
        faults=dict(sorted(log.faults.items())),
        starts=len(log.begins),
        same_losses=hurt.losses() == calm.losses(),
        unexpected=tuple(log.unexpected),
        max_steps_lost=max(log.lost, default=0),
        save_every=SAVE_EVERY,
        cold_start_seconds=round(cold_seconds, 2),
        resume_seconds=round(median(resumes), 2),
        effective_share=round(effective / wall, 4),
        predicted_share=round(share(stall, interval, mean(gaps), wall / len(gaps)), 4),
        projected_share=round(_projected(stall, mean(gaps)), 5),
        stall_seconds=round(stall, 4),
        wall_seconds=round(wall, 1),
        spent_seconds={kind: round(getattr(ledger, f"{kind}_seconds"), 2) for kind in _KINDS},
    )


def share(stall: float, interval: float, restart: float, between: float) -> float:
    """Effective share of the time by the interval model.

    Of the time between two failures, a restart and half an interval are lost; of the rest, a stall
    goes with every interval. To first order this is 1 − s/T − (T/2 + R)/M.
    """
    return (1 - (interval / 2 + restart) / between) / (1 + stall / interval)


def _projected(stall: float, restart: float) -> float:
    between = 3600 * PROJECTED_HOURS
    return share(stall, (2 * stall * between) ** 0.5, restart, between)


def _begin(step: LoggedStep) -> float:
    return step.time - step.report.step_seconds


def _firsts(steps: Sequence[LoggedStep], begins: Sequence[float]) -> list[tuple[LoggedStep, float]]:
    """The first step of every start that took one, and when it was started."""
    ends = [*begins[1:], float("inf")]
    pairs = []
    for begin, end in zip(begins, ends, strict=True):
        own = [step for step in steps if begin < step.time <= end]
        pairs += [(own[0], begin)] if own else []
    return pairs


def _gaps(
    steps: Sequence[LoggedStep], events: Sequence[Event], begins: Sequence[float]
) -> list[float]:
    """From the last sign of life before each restart to the first step after it."""
    signs = sorted([step.time for step in steps] + [event.time for event in events])
    return [
        _begin(first) - max(sign for sign in signs if sign < begin)
        for first, begin in _firsts(steps, begins[1:])
    ]
