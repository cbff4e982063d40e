"""Who hangs: a heartbeat per rank, and a thread in each that ends the run if nothing moves.

The main thread says what it is at; a thread beside it writes that down every few seconds. If a
step, a save or the start-up takes too long, the thread looks at the other ranks' heartbeats, writes
all stacks and the last collectives, and ends the process: a collective that waits for a lost rank
never returns.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.engine.collectives import write_collectives
from pipeline.errors import ExitCode
from pipeline.limits import GuardsConfig
from pipeline.track.faults import FAULTS_FOLDER, RankFault, stacks_path, write_fault

HEARTBEAT_FOLDER = "heartbeats"
# In the order of a step: of two ranks in one step, the one in the earlier phase is behind.
PHASES = ("start", "data", "compute", "agree", "update", "log", "save", "end")
# What such a phase waits for where it is not the other ranks or a device.
_WAITS_FOR = {
    "data": "the loader or the storage of the shards",
    "log": "the storage of the run",
    "save": "the storage of the run",
    "wait": "the storage of the run",
    "end": "the storage of the run or a server that gets its numbers",
}
_TICK_SECONDS = 1.0
# A gap in this thread's own ticks means that the whole process was stopped or starved.
_SUSPENDED_SECONDS = 5.0
_RECENT = 100
# After a stop signal a lost peer must not cost the whole patience: the grace is running out.
_HANG_SECONDS_WHEN_STOPPING = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What a rank was at when it last wrote."""

    rank: int
    number: int
    """Rises with every heartbeat; one that stands still belongs to a process that does."""
    phase: str
    step: int
    host: str


class Watchdog:
    """Watches one rank; `enter` is all that the training thread has to call.

    Args:
        rank: This rank.
        world_size: Ranks in all.
        config: How long a step may take.
        is_stopping: Whether this process has been asked to stop.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        config: GuardsConfig,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._rank, self._world_size, self._config = rank, world_size, config
        self._is_stopping = is_stopping
        self._run_dir: Path | None = None
        self._attempt = 0
        self._place = ("start", 0)
        self._unit, self._begin, self._has_precedent = "start", time.monotonic(), False
        self._allowance = 0.0
        self._taken: dict[str, deque[float]] = {}
        self._number = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # Thousands of ranks share one file system.
        self._beat_seconds = min(10.0, 2.0 + world_size / 200)
        # Long enough for every living rank to give another heartbeat.
        self._confirm_seconds = self._beat_seconds + 2 * _TICK_SECONDS

    @property
    def place(self) -> tuple[str, int]:
        """Phase and step that this rank is at."""
        return self._place

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def attach(self, run_dir: Path, attempt: int) -> None:
        """From now on heartbeats go to the run's folder."""
        self._attempt = attempt
        with contextlib.suppress(OSError):
            (run_dir / HEARTBEAT_FOLDER).mkdir(exist_ok=True)
        self._run_dir = run_dir
        self._beat()

    def begin(
        self, unit: str, step: int, *, has_precedent: bool = True, allowance: float = 0.0
    ) -> None:
        """A new stretch with its own limit begins: `start`, `step`, `save` or `end`.

        Args:
            unit: Its kind; earlier ones of that kind say how long it may take.
            step: The run's step.
            has_precedent: False for a stage's first step, which compiles and allocates.
            allowance: Seconds that it may take in any case.
        """
        now = time.monotonic()
        if self._has_precedent:
            self._taken.setdefault(self._unit, deque(maxlen=_RECENT)).append(now - self._begin)
        if not has_precedent:
            self._taken.pop(unit, None)
        self._unit, self._begin, self._has_precedent = unit, now, has_precedent
        self._allowance = allowance
        self._place = ("data" if unit == "step" else unit, step)

    def enter(self, phase: str) -> None:
        """The rank is now in this phase of its step."""
        self._place = (phase, self._place[1])

    def recent(self, unit: str) -> float:
        """Seconds that the slowest of recent stretches of a kind took; 0 before the second."""
        return max(self._taken.get(unit, ()), default=0.0)

    @property
    def limit_seconds(self) -> float:
        """How long the present stretch may take."""
        patience = self._config.hang_seconds
        if self._is_stopping():
            patience = min(patience, _HANG_SECONDS_WHEN_STOPPING)
        patience = max(_TICK_SECONDS, patience - self._confirm_seconds)
        taken = self._taken.get(self._unit)
        if not self._has_precedent or not taken:
            return max(self._config.slow_phase_seconds, patience)
        slowest = sorted(taken)[int(0.99 * (len(taken) - 1))]
        return patience + max(3 * slowest, self._allowance)

    def stop(self) -> None:
        """Ends the watch and takes the heartbeat away."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(2 * _TICK_SECONDS)
        if self._run_dir is not None:
            with contextlib.suppress(OSError):
                _beat_path(self._run_dir, self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        last, next_beat = time.monotonic(), 0.0
        while not self._ended.wait(_TICK_SECONDS):
            now = time.monotonic()
            if now - last > _SUSPENDED_SECONDS:
                # Stopped and continued as a whole, such as by a scheduler: that time is no hang.
                self._begin += now - last
            last = now
            if now >= next_beat:
                self._beat()
                next_beat = now + self._beat_seconds
            if now - self._begin > self.limit_seconds:
                self._report(now - self._begin)

    def _beat(self) -> None:
        if self._run_dir is None:
            return
        self._number += 1
        phase, step = self._place
        beat = Beat(
            rank=self._rank, number=self._number, phase=phase, step=step, host=socket.gethostname()
        )
        path = _beat_path(self._run_dir, self._rank)
        temporary = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(beat)))
            temporary.replace(path)

    def _report(self, seconds: float) -> None:
        """Writes stacks, names who hangs and ends the process, unless it moves meanwhile."""
        begin, (phase, step) = self._begin, self._place
        self._beat()
        before = read_beats(self._run_dir)
        self._ended.wait(self._confirm_seconds)
        self._beat()
        after = read_beats(self._run_dir)
        if self._begin != begin or self._ended.is_set():
            return
        who = "the ranks had not met yet"
        if self._run_dir is not None:
            who = culprit(before, after, self._world_size)
        what = {"start": "the start", "step": f"step {step}"}.get(
            self._unit, f"{self._unit} of step {step}"
        )
        reason = f"hang: {what} took more than {seconds:.0f} s; {who}"
        if self._run_dir is not None:
            self._write_stacks(self._run_dir)
            fault = RankFault(
                attempt=self._attempt, rank=self._rank, reason=reason, kind="HangError",
                exit_code=ExitCode.PEER_LOST, phase=phase, step=step, told_by="watchdog",
            )  # fmt: skip
            write_fault(self._run_dir, fault)
        sys.stderr.write(f"error: rank {self._rank}: {reason}\n")
        sys.stderr.flush()
        # Not an exception: the main thread is in a call that does not return.
        os._exit(ExitCode.PEER_LOST)

    def _write_stacks(self, run_dir: Path) -> None:
        path = stacks_path(run_dir, self._rank)
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(all_threads=True)
        write_collectives(run_dir / FAULTS_FOLDER, self._rank)


def read_beats(run_dir: Path | None) -> dict[int, Beat]:
    """The last heartbeat of every rank that has left one."""
    if run_dir is None:
        return {}
    found = []
    for path in (run_dir / HEARTBEAT_FOLDER).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Beat(**json.loads(path.read_text())))
    return {beat.rank: beat for beat in found}


def culprit(before: Mapping[int, Beat], after: Mapping[int, Beat], world_size: int) -> str:
    """Who hangs, in words, from heartbeats read twice with at least one due between.

    A rank without a new heartbeat is stopped or gone. If all give signs of life, the one that is
    furthest behind in the step holds the others up.
    """
    silent = [r for r in range(world_size) if _is_silent(before.get(r), after.get(r))]
    if silent:
        words = [_last_seen(rank, after.get(rank)) for rank in silent[:4]]
        more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
        return f"{'; '.join(words)}{more}: stopped, killed or its machine is lost"
    places = {rank: _place(beat) for rank, beat in after.items()}
    first = min(places.values())
    behind = [after[rank] for rank, place in sorted(places.items()) if place == first]
    told = ", ".join(f"rank {beat.rank} on {beat.host}" for beat in behind[:4])
    phase = behind[0].phase
    where = f"in {phase} of step {behind[0].step}"
    if len(behind) < world_size:
        verb, them = ("is", "it") if len(behind) == 1 else ("are", "them")
        return f"{told} {verb} {where} and the others wait for {them}"
    who, others = ("all ranks are", "a collective or ") if world_size > 1 else (f"{told} is", "")
    cause = _WAITS_FOR.get(phase, f"{others}a device")
    return f"{who} {where}: {cause} does not answer, or no processor is free (see the stacks)"


def _is_silent(before: Beat | None, after: Beat | None) -> bool:
    return after is None or (before is not None and before.number == after.number)


def _last_seen(rank: int, beat: Beat | None) -> str:
    if beat is None:
        return f"rank {rank} never gave a sign of life"
    return (
        f"rank {rank} on {beat.host} gives no sign of life since it was in {beat.phase} of step "
        f"{beat.step}"
    )


def _place(beat: Beat) -> tuple[int, int]:
    return beat.step, PHASES.index(beat.phase) if beat.phase in PHASES else len(PHASES)


def _beat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / HEARTBEAT_FOLDER / f"rank-{rank:05d}.json"
