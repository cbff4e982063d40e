"""Which process owns a run: named so that a later process of the same number is another one."""

import json
import os
import socket
import time
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline.environment import job_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who made a lease."""

    host: str
    pid: int
    process: str
    """Boot, process namespace and start time: the same number again is another process."""
    job: str = ""
    """The scheduler's job, if there is one."""
    launcher_attempt: str = ""
    since: str = ""
    """UTC; a label only."""
    released: bool = False
    brief: bool = False
    """Holds the lease for a moment, to remove checkpoints: others wait for it."""

    @property
    def words(self) -> str:
        """How messages name it."""
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process() -> Owner:
    """The process that runs this."""
    job, attempt = job_id()
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_mark(os.getpid()),
        job=job,
        launcher_attempt=attempt,
        since=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    )


def process_mark(pid: int) -> str:
    """Tells a process from a later one of the same number; empty if there is none."""
    try:
        # The command's name may hold spaces; what follows its bracket does not.
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return ""
    state, start = words[0], words[19]
    return "" if state in "ZX" else f"{boot}/{space}/{start}"


def is_seen_from(owner: Owner, me: Owner) -> bool:
    """Whether `me` can tell if that process lives: same machine, same process numbers."""
    return owner.host == me.host and _namespace(owner.process) == _namespace(me.process)


def has_died(owner: Owner, me: Owner) -> bool:
    """Whether `me` can tell that the owner's process is no more."""
    return is_seen_from(owner, me) and process_mark(owner.pid) != owner.process


def _namespace(mark: str) -> str:
    return mark.rpartition("/")[0]


def read_owner(path: Path) -> Owner | None:
    """Who wrote a lease; None while it is being written."""
    known = {field.name for field in fields(Owner)}
    try:
        record = json.loads(path.read_text())
        return Owner(**{key: value for key, value in record.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
