"""Locks that a killed compilation left: every later start would wait for them for ever.

torch holds a lock as an open file named `lock` in an operator's build folder and waits for it to
vanish, whoever made it (torch/utils/file_baton.py). Who keeps it open owns it.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from launch.preflight.finding import Answer, Finding, Situation
from pipeline.environment import extensions_dir

NAME = "compiled ops"
# Between nodes that share the folder nobody sees the other's open files: a build that has written
# nothing for so long is over.
_QUIET_SECONDS = 600.0
# A lock that was made this moment may not be listed among its owner's open files yet.
_YOUNG_SECONDS = 5.0


def check_extensions(_situation: Situation) -> Finding:
    """Which locks there are in TORCH_EXTENSIONS_DIR, and which of them this node holds."""
    folder = extensions_dir()
    locks = sorted(folder.glob("*/lock")) + sorted(folder.glob("*/*/lock"))
    held = [str(lock) for lock in locks if _is_open_here(lock)]
    got = "no lock" if not locks else f"{len(locks)} lock(s), {len(held)} held by a process here"
    values = {"locks": [str(lock) for lock in locks], "held": held}
    return Finding(
        name=NAME, state="ok", expected=f"no stale lock in {folder}", got=got, values=values
    )


def compare_extensions(situation: Situation, answers: Sequence[Answer]) -> Finding:
    """Removes the locks that no node holds; rank 0 does so for the folder that it sees."""
    found = [finding for one in answers if (finding := one.of(NAME)) is not None]
    own = next((one.of(NAME) for one in answers if one.rank == situation.launch.rank), None)
    if own is None or not own.values:
        return Finding(name=NAME, state="skip", got="not looked at")
    held = {lock for finding in found for lock in finding.values.get("held", ())}
    # Folders of the nodes' own are cleaned by the nodes: those locks are not seen here.
    alone = len(found) == 1
    stale = [
        Path(lock)
        for lock in own.values["locks"]
        if lock not in held and _is_stale(Path(lock), alone=alone)
    ]
    for lock in stale:
        with contextlib.suppress(FileNotFoundError):
            lock.unlink()
    waiting = len(set(own.values["locks"]) - held) - len(stale)
    got = f"removed {', '.join(map(str, stale))}" if stale else own.got
    if waiting <= 0:
        return Finding(name=NAME, state="ok", expected=own.expected, got=got)
    return Finding(
        name=NAME,
        state="warn",
        expected=own.expected,
        got=f"{got}; {waiting} lock(s) whose owner is not seen are younger than 10 min",
        remedy="If no other job compiles there now, remove them: a start would wait for ever.",
    )


def _is_stale(lock: Path, *, alone: bool) -> bool:
    with contextlib.suppress(OSError):
        newest = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()))
        limit = _YOUNG_SECONDS if alone or not _is_shared(lock) else _QUIET_SECONDS
        return time.time() - newest > limit
    return False


def _is_shared(path: Path) -> bool:
    """Whether other machines may see this folder, by the file system that it lies on."""
    best, kind = "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            mount, filesystem = line.split()[1:3]
            if str(path).startswith(mount.rstrip("/") + "/") and len(mount) >= len(best):
                best, kind = mount, filesystem
    return kind not in ("ext4", "ext3", "xfs", "btrfs", "tmpfs", "overlay", "zfs")


def _is_open_here(lock: Path) -> bool:
    try:
        wanted = lock.stat()
    except OSError:
        return False
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            status = link.stat()
            if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
