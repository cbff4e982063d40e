"""A run's folder: made once, taken up again on every resume, never shared by two runs."""

import fcntl
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import torch.distributed as dist

from pipeline.checkpoint.layout import list_commits
from pipeline.checkpoint.load import Found, find_commit
from pipeline.checkpoint.save import clear_partials, set_aside_after
from pipeline.clip import SampleFault
from pipeline.config.load import resolved_yaml
from pipeline.environment import Launch, git_commit, machine
from pipeline.errors import CheckpointError, JepaError, StorageError, UsageError
from pipeline.files import write_atomically
from pipeline.run import RunConfig
from pipeline.track.folder import (
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    RUN_FILE,
    read_run_info,
    write_json,
)
from pipeline.track.jsonl import JsonLinesWriter

_T = TypeVar("_T")
# Open until the process ends: closing a file gives up its lock.
_held: list[IO[str]] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How this process's share of a run begins, the same on all ranks."""

    run_id: str
    found: Found | None
    """The commit to go on from, or None for a fresh run."""
    ignored: tuple[str, ...] = ()
    """Saves that were cut short and have been removed, and newer commits that were set aside."""


def begin_fresh(config: RunConfig, launch: Launch) -> Start:
    """Makes the folder of a new run.

    Raises:
        UsageError: There is a run of this name with checkpoints; it is left untouched.
    """
    return _told_by_rank_0(lambda: _make_folder(config, launch))


def begin_again(config: RunConfig, launch: Launch, step: int | None) -> Start:
    """Finds the commit from which a run goes on, every digest checked.

    Raises:
        CheckpointError: There is none, it is damaged, or it was saved by another number of ranks.
    """
    return _told_by_rank_0(lambda: _find(config, launch, step))


def clear_the_way(run_dir: Path, step: int) -> list[str]:
    """Removes saves that were cut short and sets newer commits aside; rank 0 calls it.

    Returns:
        Names of what was removed, and new names of what was set aside.
    """
    return clear_partials(run_dir) + set_aside_after(run_dir, step)


def record_faults(run_dir: Path, faults: tuple[SampleFault, ...]) -> None:
    """Appends all ranks' bad samples to the quarantine file; every rank calls it."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, faults)
    if dist.get_rank() == 0:
        append_faults(run_dir, tuple(fault for part in gathered for fault in part))


def append_faults(run_dir: Path, faults: tuple[SampleFault, ...]) -> None:
    """Appends bad samples to the quarantine file, from this rank alone."""
    writer = JsonLinesWriter(run_dir / QUARANTINE_FILE)
    for fault in sorted(faults, key=lambda fault: fault.position):
        writer.write(asdict(fault))
    writer.close()


def _make_folder(config: RunConfig, launch: Launch) -> Start:
    run_dir = config.run_dir
    if list_commits(run_dir):
        raise UsageError(
            f"{run_dir} already holds a run with checkpoints.",
            remedy=f"Continue it with `jepa resume {run_dir}`, or choose another name=…",
        )
    if (run_dir / METRICS_FILE).exists() and (run_dir / METRICS_FILE).stat().st_size:
        raise UsageError(
            f"{run_dir} holds the records of a run whose checkpoints are gone.",
            remedy="Choose another name=…, or move that folder away.",
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    _hold(run_dir)
    # An attempt that never took a step has left nothing to continue or to lose.
    for leftover in (METRICS_FILE, EVENTS_FILE, QUARANTINE_FILE):
        (run_dir / leftover).unlink(missing_ok=True)
    write_atomically(run_dir / CONFIG_FILE, resolved_yaml(config))
    run_id = uuid.uuid4().hex[:12]
    created = datetime.now(UTC).isoformat(timespec="seconds")
    _note_start(run_dir, launch, 0, {"run_id": run_id, "name": config.name, "created": created})
    return Start(run_id=run_id, found=None)


def _find(config: RunConfig, launch: Launch, step: int | None) -> Start:
    run_dir = config.run_dir
    _hold(run_dir)
    found = find_commit(run_dir, step)
    saved = found.manifest.world_size
    if saved != launch.world_size:
        raise CheckpointError(
            f"Step {found.commit.step} of {run_dir} was saved by {saved} ranks; "
            f"this job has {launch.world_size}.",
            remedy=f"Start {saved} ranks: `jepa resume {run_dir} --ranks {saved}`.",
        )
    info = read_run_info(run_dir)
    if info.get("run_id") != found.manifest.run_id:
        raise CheckpointError(
            f"{found.commit.path} belongs to run {found.manifest.run_id}, "
            f"the folder to run {info.get('run_id')}: two runs were mixed."
        )
    _note_start(run_dir, launch, found.commit.step, {})
    return Start(run_id=found.manifest.run_id, found=found)


def _hold(run_dir: Path) -> None:
    """Makes this process the run's owner until it ends, on this machine or where locks are shared.

    Raises:
        UsageError: Another job owns it.
    """
    lock = (run_dir / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{run_dir} is in use by another job.",
            remedy=f"See `jepa status {run_dir}`; `jepa stop {run_dir}` ends that job.",
        ) from None
    _held.append(lock)


def _note_start(run_dir: Path, launch: Launch, step: int, fields: dict[str, Any]) -> None:
    # A fresh run brings its own fields and forgets those of an attempt that never saved.
    info = fields or read_run_info(run_dir)
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "world_size": launch.world_size,
        "launcher": launch.launcher,
        "code": git_commit(Path(__file__).parent),
        "machine": machine(),
    }
    starts = [*info.get("starts", []), entry]
    write_json(run_dir / RUN_FILE, {**info, "world_size": launch.world_size, "starts": starts})


def _told_by_rank_0(action: Callable[[], _T]) -> _T:
    """Runs `action` on rank 0; every rank gets its result or raises its error."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except JepaError as error:
            outcome[0] = error
        except OSError as error:
            outcome[0] = StorageError(f"{error.filename}: {error.strerror or error}")
    dist.broadcast_object_list(outcome, src=0)
    result: Any = outcome[0]
    if isinstance(result, JepaError):
        raise result
    return result
