"""Notes that ranks leave each other in a folder while they save, without a collective.

Saving goes on in threads behind the training. A collective of theirs would meet those of the
training in another order on another rank; a small file meets nobody.
"""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.files import write_atomically

# At first quickly, for small states on a local disk; a shared file system is asked more rarely.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.005, 0.5


def leave_note(folder: Path, rank: int, content: Mapping[str, Any]) -> None:
    """Leaves a rank's note; whoever reads it sees all of it."""
    write_atomically(_path(folder, rank), json.dumps(content))


def collect_notes(
    folder: Path, world_size: int, *, timeout_seconds: float, give_up: threading.Event
) -> dict[int, dict[str, Any]]:
    """Waits for every rank's note.

    Args:
        folder: Where they are left.
        world_size: How many to wait for.
        timeout_seconds: How long to wait for the last of them.
        give_up: Ends the wait early.

    Returns:
        The notes that were there in time, by rank.
    """
    notes: dict[int, dict[str, Any]] = {}
    deadline, pause = time.monotonic() + timeout_seconds, _FIRST_PAUSE_SECONDS
    while True:
        for rank in set(range(world_size)) - notes.keys():
            if _path(folder, rank).exists():
                notes[rank] = json.loads(_path(folder, rank).read_text())
        if len(notes) == world_size or time.monotonic() > deadline or give_up.wait(pause):
            return notes
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)


def remove_notes(folder: Path, world_size: int) -> None:
    """Removes all ranks' notes."""
    for rank in range(world_size):
        _path(folder, rank).unlink(missing_ok=True)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
