"""Everything known of a run, gathered from its folder; of a live run as well as of a dead one."""

import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoint.layout import list_commits
from pipeline.config.load import load_config
from pipeline.errors import ConfigError, UsageError
from pipeline.run import RunConfig
from pipeline.track.faults import read_faults, with_faults
from pipeline.track.folder import (
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    RUN_FILE,
    STOP_FILE,
    ProbeScore,
    read_probes,
    read_run_info,
    start_times,
)
from pipeline.track.health import Health, verdict
from pipeline.track.jobs import JOBS_FILE
from pipeline.track.journal import damaged_steps, read_journal, teacher_distances
from pipeline.track.jsonl import read_json_lines
from pipeline.track.lease import look
from pipeline.track.ledger import Ledger, time_ledger
from pipeline.track.metrics import (
    Event,
    LoggedStep,
    StageCost,
    read_all_metrics,
    read_events,
    without_superseded,
)
from pipeline.track.owner import has_died, this_process
from pipeline.track.rates import Rates, eta_seconds, window_rates
from pipeline.track.verdict import Checkpoints, Verdict, judge

State = Literal[
    "not started", "starting", "running", "stopping", "finished", "stopped", "failed", "silent"
]

# A run that has shown no sign for this long, or for ten of its steps, is taken to be dead.
_SILENT_SECONDS, _SILENT_STEPS = 120.0, 10
_WINDOW_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run's folder says."""

    run_dir: Path
    config: RunConfig | None
    config_problem: str | None
    """Why config.yaml cannot be read, if it cannot."""
    info: dict[str, Any]
    all_steps: tuple[LoggedStep, ...]
    """In the order taken, superseded ones included."""
    events: tuple[Event, ...]
    probes: tuple[ProbeScore, ...]
    faults: tuple[dict[str, Any], ...]
    """Lines of the quarantine file."""
    commits: tuple[int, ...]
    """Steps of the checkpoints that are whole by name."""
    now: float
    is_abandoned: bool = False
    """Nobody owns the run: its last owner gave it up, or this machine knows that it has died."""

    @cached_property
    def steps(self) -> tuple[LoggedStep, ...]:
        """The steps that count, ascending."""
        return without_superseded(self.all_steps)

    @cached_property
    def health(self) -> Health:
        """The verdict on the features."""
        return verdict([step.report for step in self.steps])

    @cached_property
    def verdict(self) -> Verdict:
        """The features, the teacher, the loss and the probes together, and which step to keep."""
        journal = read_journal(self.run_dir)
        checkpoints = Checkpoints(
            steps=self.commits,
            damaged=damaged_steps(journal),
            teacher_distances=teacher_distances(journal),
        )
        history = [step.report for step in self.steps]
        return judge(history, self.probes, checkpoints, health=self.health)

    @cached_property
    def ledger(self) -> Ledger | None:
        """Where the time went."""
        return time_ledger(self.all_steps, self.events, start_times(self.run_dir))

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run."""
        return self.config.num_steps if self.config else None

    @property
    def last_step(self) -> int:
        """The last step taken that counts; 0 before the first."""
        return self.steps[-1].report.step if self.steps else 0

    @property
    def last_sign(self) -> float | None:
        """When the run last wrote anything, unix seconds."""
        signs = [step.time for step in self.all_steps[-1:]]
        signs += [event.time for event in self.events[-1:]]
        signs += start_times(self.run_dir)[-1:]
        return max(signs, default=None)

    @property
    def rates(self) -> Rates | None:
        """Rates over the last steps."""
        reports = [step.report for step in self.steps[-_WINDOW_STEPS:]]
        stated = self.config.track.peak_tflops if self.config else None
        peak = stated if isinstance(stated, float) else None
        world_size = int(self.info.get("world_size", 1))
        return window_rates(reports, peak_tflops=peak, world_size=world_size)

    @property
    def eta_seconds(self) -> float | None:
        """Time left if it runs on; None if that cannot be told."""
        return eta_seconds(self.steps[-_WINDOW_STEPS:], self._plan())

    @property
    def state(self) -> State:
        """Whether the run is going on, and how it ended if not."""
        ending = how_ended(self.events, self.run_dir)
        if ending is not None:
            return ending
        if self.last_sign is None:
            return "not started"
        rates = self.rates
        patience = max(_SILENT_SECONDS, _SILENT_STEPS * (rates.step_seconds if rates else 0.0))
        if self.is_abandoned or self.now - self.last_sign > patience:
            return "silent"
        if self._is_loading():
            return "starting"
        return "stopping" if (self.run_dir / STOP_FILE).exists() else "running"

    @property
    def reason(self) -> str:
        """Why the run ended as it did; empty if it goes on."""
        if self.state not in ("finished", "stopped", "failed"):
            return ""
        ends: list[Event] = []
        for event in reversed(self.events):
            if event.name in ("start", "resume"):
                break
            if event.name in ("end", "stop", "fault"):
                ends.append(event)
        # That a rank lost the others says nothing if one of those has told why.
        causes = [event for event in ends if event.details.get("kind") != "PeerLostError"]
        return str((causes or ends)[0].details.get("reason", ""))

    def _is_loading(self) -> bool:
        """True from the start of the processes to their first event."""
        began = max(start_times(self.run_dir), default=0.0)
        return not any(event.time >= began for event in self.events)

    def _plan(self) -> list[StageCost]:
        return self.config.stage_costs() if self.config else []


def how_ended(events: Sequence[Event], run_dir: Path) -> State | None:
    """How a run's newest attempt ended, by its own word; None while it has said nothing."""
    endings: dict[str, State] = {"end": "finished", "stop": "stopped", "fault": "failed"}
    started = max(start_times(run_dir), default=0.0)
    for event in reversed(events):
        # A start is noted to the second; what it has ended cannot be newer than it began.
        if event.name in ("start", "resume") or event.time < started:
            return None
        if event.name in endings:
            return endings[event.name]
    return None


def gather(run_dir: Path) -> RunFacts:
    """Reads a run's folder.

    Raises:
        UsageError: It is no run's folder; the nearest names of runs are told.
    """
    check_is_run(run_dir)
    # Before the events: a run tells how it ended first, then it gives itself up.
    is_abandoned = _is_abandoned(run_dir)
    config, problem = _read_config(run_dir)
    return RunFacts(
        run_dir=run_dir,
        config=config,
        config_problem=problem,
        info=read_run_info(run_dir),
        all_steps=read_all_metrics(run_dir),
        events=with_faults(read_events(run_dir), read_faults(run_dir)),
        probes=read_probes(run_dir),
        faults=read_json_lines(run_dir / QUARANTINE_FILE).records,
        commits=tuple(commit.step for commit in list_commits(run_dir)),
        now=time.time(),
        is_abandoned=is_abandoned,
    )


def _is_abandoned(run_dir: Path) -> bool:
    held = look(run_dir)
    if held is None or held.owner is None:
        return False
    return held.owner.released or has_died(held.owner, this_process())


def check_is_run(run_dir: Path) -> None:
    """Refuses a path that is no run's folder.

    Raises:
        UsageError: With the nearest names of runs beside it and under runs/.
    """
    if _is_run(run_dir):
        return
    what = "does not exist" if not run_dir.exists() else "is not the folder of a run"
    folders = [run_dir.parent, Path("runs"), run_dir]
    runs = {str(run): run.name for folder in folders for run in _runs_in(folder)}
    close = difflib.get_close_matches(run_dir.name, sorted(set(runs.values())), n=3, cutoff=0.5)
    near = [path for path, name in runs.items() if name in close] or sorted(runs)[:5]
    raise UsageError(
        f"{run_dir} {what}.",
        remedy=f"Did you mean {' or '.join(near)}?"
        if near
        else "Give the folder that `jepa train` named, such as runs/NAME.",
    )


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (RUN_FILE, METRICS_FILE, EVENTS_FILE, JOBS_FILE))


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))


def _read_config(run_dir: Path) -> tuple[RunConfig | None, str | None]:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return None, f"there is no {CONFIG_FILE}"
    try:
        return load_config(path, RunConfig).config, None
    except ConfigError as error:
        return None, str(error)
