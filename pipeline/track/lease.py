"""One run, one owner: a numbered lease that also fences off an owner who wakes up too late.

RUN/lease/00000007.json belongs to whoever made it, and the highest number owns the run. A number
is made at most once (exclusive creation), so of any number of takers one wins, and an owner that
was paused while another took over finds a higher number, or its own file gone, and stops. Its
number is the fencing token that every checkpoint's manifest carries.
"""

import contextlib
import json
import os
import re
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.errors import ExitCode, StorageError, UsageError
from pipeline.files import create_exclusively
from pipeline.track.owner import Owner, has_died, is_seen_from, read_owner, this_process

LEASE_FOLDER = "lease"
_NAME = re.compile(r"(\d{8})\.json")
# An owner gives a sign every few seconds; one that has given none for so long is gone.
STALE_SECONDS = 30.0
_TOUCH_SECONDS = 5.0
_POLL_SECONDS = 0.5


class OwnerError(UsageError):
    """Another job owns the run."""


class RunGoneError(OwnerError):
    """The run's folder was removed or renamed."""

    exit_code = ExitCode.STORAGE


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """The newest lease as another process sees it."""

    token: int
    owner: Owner | None
    """None while its file is being written."""
    age_seconds: float
    """Since its owner's last sign of life, by the file system's clock."""
    stamp: int
    """Changes with every sign of life."""


class Lease:
    """This process's ownership of a run; rank 0 has it.

    Attributes:
        token: The fencing token; rises with every owner of the run.
    """

    def __init__(self, folder: Path, token: int, owner: Owner) -> None:
        self._folder, self.token, self._owner = folder, token, owner
        self._path = folder / _name(token)
        self._next = folder / _name(token + 1)
        self._ended = threading.Event()
        self._is_anothers = False

    def keep_alive(self) -> None:
        """Gives signs of life from a thread until the lease is released or the process ends."""
        threading.Thread(target=self._touch, name="lease", daemon=True).start()

    def check(self) -> None:
        """Refuses to go on if another job has taken the run over.

        Raises:
            OwnerError: It has; nothing may be written any more.
            StorageError: The folder cannot be looked at.
        """
        run = self._folder.parent
        try:
            if self._path.exists() and not self._next.exists() and not self._is_anothers:
                return
            newer = look(run)
        except OSError as error:
            raise StorageError(f"Cannot read {self._folder}: {error.strerror or error}") from error
        if newer is None:
            raise RunGoneError(
                f"{run} was removed or renamed under this job ({self._owner.words}).",
                remedy="`jepa resume` it by its new name, or from its store with --store URL.",
            )
        who = newer.owner.words if newer.owner else "another job"
        raise OwnerError(
            f"{run} was taken over by {who} while this process "
            f"({self._owner.words}) gave no sign of life; nothing more is written by it.",
            remedy="Nothing to do: the other job goes on with the run. `jepa status` shows it.",
        )

    def release(self) -> None:
        """Gives the run up, so that the next owner need not wait."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if self._path.exists() and not self._is_anothers:
                _write(self._path, Owner(**{**asdict(self._owner), "released": True}))

    def _touch(self) -> None:
        while not self._ended.wait(_TOUCH_SECONDS):
            # In a folder that was removed and begun anew numbers start again at 1.
            self._is_anothers = read_owner(self._path) not in (None, self._owner)
            if self._is_anothers:
                return
            with contextlib.suppress(OSError):
                # No time of our own: a file server stamps it with its own clock, like all others.
                os.utime(self._path)


class Ownership:
    """A rank's share in owning the run: rank 0 holds the lease, for the others this is empty."""

    def __init__(self) -> None:
        self._lease: Lease | None = None

    @property
    def token(self) -> int:
        """The fencing token; 0 where there is none."""
        return self._lease.token if self._lease is not None else 0

    def take(self, run_dir: Path) -> int:
        """Makes this process the run's owner and keeps it so.

        Returns:
            The fencing token.

        Raises:
            OwnerError: The run has a living owner.
        """
        self._lease = acquire(run_dir)
        self._lease.keep_alive()
        return self._lease.token

    def check(self) -> None:
        """Refuses to write for a run that another job has taken over.

        Raises:
            OwnerError: It has.
        """
        if self._lease is not None:
            self._lease.check()

    def release(self) -> None:
        """Gives the run up."""
        if self._lease is not None:
            self._lease.release()


def acquire(run_dir: Path, *, stale_seconds: float = STALE_SECONDS, brief: bool = False) -> Lease:
    """Makes this process the owner of a run.

    A dead owner's place is taken at once if it was a process of this machine, else when it has
    given no sign for `stale_seconds`; it is waited for if it seems to be dead.

    Args:
        run_dir: Folder of the run.
        stale_seconds: Without a sign for so long, an owner is gone.
        brief: The lease is released in a moment; who wants it meanwhile waits.

    Raises:
        OwnerError: It has a living owner; host, process and age are told.
        StorageError: The folder cannot be written to.
    """
    folder = run_dir / LEASE_FOLDER
    me = replace(this_process(), brief=brief)
    deadline = time.monotonic() + 2 * stale_seconds
    try:
        folder.mkdir(exist_ok=True)
        while True:
            held = look(run_dir)
            if held is not None and not _is_free(held, me, stale_seconds):
                _wait_or_refuse(run_dir, held, deadline)
                continue
            lease = _make(folder, (held.token if held else 0) + 1, me)
            if lease is not None:
                return lease
    except OSError as error:
        raise StorageError(f"Cannot write {folder}: {error.strerror or error}") from error


def look(run_dir: Path) -> Held | None:
    """The newest lease of a run; None if it never had one."""
    folder = run_dir / LEASE_FOLDER
    tokens = _tokens(folder)
    if not tokens:
        return None
    path = folder / _name(tokens[-1])
    try:
        stamp = path.stat()
    except FileNotFoundError:
        return look(run_dir)  # taken over and removed since it was listed
    age = max(0.0, _now_of(folder) - stamp.st_mtime)
    return Held(token=tokens[-1], owner=read_owner(path), age_seconds=age, stamp=stamp.st_mtime_ns)


def in_use_by(run_dir: Path) -> str | None:
    """Which living job owns a run; None if it is free. Takes nothing, and waits for a sign of life.

    An owner on another machine gives one every few seconds, so this may take twice as long.
    """
    held, me = look(run_dir), this_process()
    if held is None or _is_free(held, me, STALE_SECONDS):
        return None
    who = held.owner.words if held.owner else "another job"
    lives_here = held.owner is not None and is_seen_from(held.owner, me)
    deadline = time.monotonic() + 2 * _TOUCH_SECONDS + 1.0
    while not lives_here and time.monotonic() < deadline:
        now = look(run_dir)
        if now is None or (now.token, now.stamp) != (held.token, held.stamp):
            return who
        time.sleep(_POLL_SECONDS)
    return who if lives_here else None


def _make(folder: Path, token: int, me: Owner) -> Lease | None:
    """The lease of this number; None if another process was quicker."""
    path = folder / _name(token)
    if not create_exclusively(path, json.dumps(asdict(me))):
        return None
    tokens = _tokens(folder)
    if tokens[-1] != token:
        # We were asleep since we looked: others have come and gone.
        path.unlink(missing_ok=True)
        return None
    for old in tokens[:-1]:
        (folder / _name(old)).unlink(missing_ok=True)
    return Lease(folder, token, me)


def _is_free(held: Held, me: Owner, stale_seconds: float) -> bool:
    owner = held.owner
    if owner is not None:
        if owner.released:
            return True
        if has_died(owner, me):
            return True
        if owner.job and owner.job == me.job and owner.launcher_attempt != me.launcher_attempt:
            # The scheduler starts a job again only when its former processes are gone.
            return True
    return held.age_seconds >= stale_seconds


def _wait_or_refuse(run_dir: Path, held: Held, deadline: float) -> None:
    """Returns after a moment if the owner may be dead.

    Raises:
        OwnerError: It lives.
    """
    owner = held.owner
    lives_here = owner is not None and is_seen_from(owner, this_process())
    is_fresh = held.age_seconds < 2 * _TOUCH_SECONDS
    is_brief = owner is not None and owner.brief
    if (is_brief or not (lives_here and is_fresh)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        now = look(run_dir)
        if is_brief or now is None or (now.token == held.token and now.stamp == held.stamp):
            return
    who = owner.words if owner else "another job"
    since = f", since {owner.since}" if owner and owner.since else ""
    raise OwnerError(
        f"{run_dir} is in use by another job: {who}{since}; its last sign of life was "
        f"{held.age_seconds:.0f} s ago.",
        remedy=f"See `jepa status {run_dir}`; `jepa stop {run_dir}` ends that job.",
    )


def _tokens(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir())
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _name(token: int) -> str:
    return f"{token:08d}.json"


def _now_of(folder: Path) -> float:
    """The file system's own clock, which may be another machine's."""
    probe = folder / f".clock-{uuid.uuid4().hex[:12]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()  # a reader without the right to write, such as `jepa status`
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _write(path: Path, owner: Owner) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(owner)))
    temporary.replace(path)
