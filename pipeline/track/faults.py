"""Why processes of a run ended, each in a file of its own.

Rank 0 writes the run's events, but the rank that fails is often another one, or rank 0 itself is
killed. So every process that ends badly leaves a file, and whoever reads the events gets both.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.errors import ExitCode
from pipeline.track.metrics import Event

FAULTS_FOLDER = "faults"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFault:
    """The last word of a process."""

    attempt: int
    """Which start of the run it belongs to, from 1."""
    rank: int
    reason: str
    exit_code: int
    kind: str = ""
    """Name of the error's class."""
    phase: str = ""
    step: int | None = None
    told_by: str = "rank"
    """`rank`, or `launcher` if the rank had no time for a word."""
    host: str = ""
    time: float = 0.0
    """Unix seconds."""

    @property
    def is_echo(self) -> bool:
        """Whether it only tells that another rank was lost."""
        return self.exit_code == ExitCode.PEER_LOST and self.told_by == "rank"

    @property
    def id(self) -> str:
        """The same for a file and for the event made of it."""
        return f"{self.attempt}-{self.rank}-{self.told_by}"


def stacks_path(run_dir: Path, rank: int) -> Path:
    """Where a rank that hangs leaves the stacks of its threads."""
    return run_dir / FAULTS_FOLDER / f"stacks-rank-{rank:05d}.txt"


def write_fault(run_dir: Path, fault: RankFault) -> None:
    """Leaves the word, with host and time; a file system that refuses cannot be told either."""
    path = run_dir / FAULTS_FOLDER / f"fault-{fault.id}.json"
    stamp = {"host": fault.host or socket.gethostname(), "time": fault.time or time.time()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps({**asdict(fault), **stamp}) + "\n")
        temporary.replace(path)


def read_faults(run_dir: Path, attempt: int | None = None) -> tuple[RankFault, ...]:
    """All words of one attempt, or of all: echoes of another rank's loss first, causes last."""
    known = {field.name for field in fields(RankFault)}
    found = []
    for path in (run_dir / FAULTS_FOLDER).glob("fault-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            record: dict[str, Any] = json.loads(path.read_text())
            found.append(RankFault(**{k: v for k, v in record.items() if k in known}))
    chosen = [fault for fault in found if attempt in (None, fault.attempt)]
    return tuple(sorted(chosen, key=lambda f: (f.attempt, not f.is_echo, -f.time)))


def fault_fields(fault: RankFault) -> dict[str, Any]:
    """What events.jsonl keeps of a word."""
    told = {key: value for key, value in asdict(fault).items() if value not in ("", None)}
    del told["time"]
    return {"id": fault.id, **told}


def untold(faults: Iterable[RankFault], events: Sequence[Event]) -> list[RankFault]:
    """The words that are not among the events yet."""
    told = {event.details.get("id") for event in events if event.name == "fault"}
    return [fault for fault in faults if fault.id not in told]


def with_faults(events: Sequence[Event], faults: Iterable[RankFault]) -> tuple[Event, ...]:
    """The events, and in their place in time the words that are not among them yet."""
    added = [
        Event(time=fault.time, name="fault", step=fault.step, details=fault_fields(fault))
        for fault in untold(faults, events)
    ]
    return tuple(sorted([*events, *added], key=lambda event: event.time)) if added else (*events,)
