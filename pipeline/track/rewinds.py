"""Which steps of a run are left out for good, because a spike stood among them.

The record belongs to the run's folder: whoever takes the same steps again leaves the same ones out.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.files import write_atomically

REWINDS_FILE = "rewinds.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewind:
    """Steps that are left out for good, and the checkpoint from which the run went on."""

    spike_step: int
    to_step: int
    first_step: int
    last_step: int
    reason: str
    is_done: bool = False
    """Whether the run has been taken up from there."""


def read_rewinds(run_dir: Path) -> tuple[Rewind, ...]:
    """All rewinds of a run, oldest first.

    Raises:
        CheckpointError: Their record cannot be read: which steps to leave out is not known.
    """
    path = run_dir / REWINDS_FILE
    try:
        return tuple(Rewind(**record) for record in json.loads(path.read_text()))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {error}", remedy="Restore it: it says which steps to leave out."
        ) from error


def write_rewinds(run_dir: Path, rewinds: Iterable[Rewind]) -> None:
    """Replaces the record."""
    text = json.dumps([asdict(rewind) for rewind in rewinds], indent=1)
    write_atomically(run_dir / REWINDS_FILE, text + "\n")


def pending(rewinds: Sequence[Rewind]) -> Rewind | None:
    """The rewind that the next start has to carry out."""
    return rewinds[-1] if rewinds and not rewinds[-1].is_done else None


def left_out(step: int, rewinds: Iterable[Rewind]) -> bool:
    """Whether a step is left out: its clips are not trained on, its number passes."""
    return any(rewind.first_step <= step <= rewind.last_step for rewind in rewinds)


def steps_to_take(first: int, last: int, rewinds: Sequence[Rewind]) -> Iterator[int]:
    """The steps from `first` to `last` that are not left out."""
    return (step for step in range(first, last + 1) if not left_out(step, rewinds))
