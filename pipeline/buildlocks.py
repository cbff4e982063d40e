"""Build locks of torch's extensions that a killed process has left behind.

DeepSpeed compiles small extensions when it first needs them. torch marks a build by an empty file
`lock` and waits for it without a limit, so a process that is killed while it builds would hang
every later start on this machine.
"""

import contextlib
import fcntl
from pathlib import Path
from typing import IO

# Held until the process ends, however it ends: the kernel lets go of them.
_held: list[IO[bytes]] = []


def clear_stale_locks(extensions: Path) -> list[Path]:
    """Removes build locks if no living process of ours uses the folder; else leaves them alone.

    Args:
        extensions: torch's folder of extensions; made if missing. From now on, this process counts
            as one that uses it.

    Returns:
        What was removed.
    """
    removed = []
    # Where the folder cannot be written to, or locks are not to be had, torch has its own say.
    with contextlib.suppress(OSError):
        extensions.mkdir(parents=True, exist_ok=True)
        users = (extensions / ".users").open("ab")
        _held.append(users)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            removed = list(extensions.glob("*/lock"))
            for lock in removed:
                lock.unlink(missing_ok=True)
        fcntl.flock(users, fcntl.LOCK_SH)
    return removed
