"""A run's folder: made once, taken up again on every resume, never shared by two runs."""

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.checkpoint.layout import list_commits
from pipeline.checkpoint.load import Found, find_commit
from pipeline.checkpoint.retain import clear_partials, set_aside_after
from pipeline.clip import SampleFault
from pipeline.config.load import resolved_yaml
from pipeline.environment import Launch
from pipeline.errors import (
    CheckpointError,
    JepaError,
    NoProgressError,
    StorageError,
    UsageError,
)
from pipeline.files import write_atomically
from pipeline.machine import git_commit, machine, process_age_seconds
from pipeline.run import RunConfig
from pipeline.track.faults import FAULTS_FOLDER, read_faults, with_faults
from pipeline.track.folder import (
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    RUN_FILE,
    read_run_info,
    update_run_info,
    write_json,
)
from pipeline.track.jsonl import JsonLinesWriter
from pipeline.track.lease import Ownership
from pipeline.track.metrics import read_events
from pipeline.track.rewinds import Rewind, pending, read_rewinds, write_rewinds

_T = TypeVar("_T")
_MAX_STARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a start was asked for."""

    resume: bool = False
    """Go on from a commit; a fresh run otherwise."""
    step: int | None = None
    """The commit to go on from; the newest that is whole by default."""
    allow_dataset_change: bool = False
    """Go on although the data is not what it was."""
    retry: bool = False
    """Go on although the last starts came nowhere."""
    is_unattended: bool = False
    """A scheduler starts this run again and again, so a crash loop has to end by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How this process's share of a run begins, the same on all ranks."""

    run_id: str
    found: Found | None
    """The commit to go on from, or None for a fresh run."""
    attempt: int = 1
    """How often the run has been started, this time included."""
    token: int = 0
    """Fencing token of the job that owns the run."""
    rewinds: tuple[Rewind, ...] = ()
    """Steps to leave out."""
    ignored: tuple[str, ...] = ()
    """Saves that were cut short and have been removed, and newer commits that were set aside."""


def begin(config: RunConfig, launch: Launch, wish: Wish, ownership: Ownership) -> Start:
    """Makes the folder of a new run, or finds the commit from which a run goes on.

    Raises:
        OwnerError: The run belongs to another job.
        UsageError: A new run was asked for and there is one of this name; it is left untouched.
        CheckpointError: There is no commit to go on from, or it is damaged.
        NoProgressError: The last starts all ended before another commit.
    """
    action = _find if wish.resume else _make_folder
    return _told_by_rank_0(lambda: action(config, launch, wish, ownership))


def note_end(run_dir: Path, how: str) -> None:
    """Records that this attempt ended in good order: it does not count as a failed start."""
    starts = read_run_info(run_dir).get("starts", [])
    if starts:
        update_run_info(run_dir, {"starts": [*starts[:-1], {**starts[-1], "ended": how}]})


def clear_the_way(run_dir: Path, step: int) -> list[str]:
    """Removes saves that were cut short and sets newer commits aside; rank 0 calls it.

    Returns:
        Names of what was removed, and new names of what was set aside.
    """
    rewinds = read_rewinds(run_dir)
    if pending(rewinds) is not None:
        write_rewinds(run_dir, [replace(rewind, is_done=True) for rewind in rewinds])
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


def _make_folder(config: RunConfig, launch: Launch, wish: Wish, ownership: Ownership) -> Start:
    run_dir = config.run_dir
    _must_be_new(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    token = ownership.take(run_dir)
    _must_be_new(run_dir)  # the former owner may have saved while its lease was waited for
    earlier = read_run_info(run_dir).get("starts", []) if wish.is_unattended else []
    write_atomically(run_dir / CONFIG_FILE, resolved_yaml(config))
    _check_progress(run_dir, earlier, 0, wish)
    # An attempt that never took a step has left nothing to continue or to lose.
    for leftover in (METRICS_FILE, EVENTS_FILE, QUARANTINE_FILE):
        (run_dir / leftover).unlink(missing_ok=True)
    if not earlier:
        shutil.rmtree(run_dir / FAULTS_FOLDER, ignore_errors=True)
    run_id = uuid.uuid4().hex[:12]
    created = datetime.now(UTC).isoformat(timespec="seconds")
    fields = {"run_id": run_id, "name": config.name, "created": created, "starts": earlier}
    attempt = _note_start(run_dir, launch, 0, fields)
    return Start(run_id=run_id, found=None, attempt=attempt, token=token)


def _must_be_new(run_dir: Path) -> None:
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


def _find(config: RunConfig, launch: Launch, wish: Wish, ownership: Ownership) -> Start:
    run_dir = config.run_dir
    token = ownership.take(run_dir)
    rewinds = read_rewinds(run_dir)
    back = pending(rewinds)
    info = read_run_info(run_dir)
    step = back.to_step if back and wish.step is None else wish.step
    found = find_commit(run_dir, step, run_id=info.get("run_id"))
    if info.get("run_id") != found.manifest.run_id:
        raise CheckpointError(
            f"{found.commit.path} belongs to run {found.manifest.run_id}, "
            f"the folder to run {info.get('run_id')}: two runs were mixed."
        )
    # What a rewind leaves out is new, so going back for it is no failed start.
    earlier = [] if back else info.get("starts", [])
    _check_progress(run_dir, earlier, found.commit.step, wish)
    return Start(
        run_id=found.manifest.run_id,
        found=found,
        attempt=_note_start(run_dir, launch, found.commit.step, info),
        token=token,
        rewinds=rewinds,
    )


def _check_progress(run_dir: Path, starts: list[dict[str, Any]], step: int, wish: Wish) -> None:
    """Ends a crash loop.

    Raises:
        NoProgressError: The last starts went on from this very step with this configuration, and
            none of them ended in good order or came to another commit.
    """
    last = starts[-_MAX_STARTS_WITHOUT_PROGRESS:]
    config = _config_digest(run_dir)
    came_nowhere = [s for s in last if (s["step"], s.get("config")) == (step, config)]
    failed = [start for start in came_nowhere if "ended" not in start]
    if wish.retry or len(failed) < _MAX_STARTS_WITHOUT_PROGRESS:
        return
    events = with_faults(read_events(run_dir), read_faults(run_dir))
    faults = [str(e.details.get("reason", e.name)) for e in events if e.name == "fault"]
    raise NoProgressError(
        f"{run_dir} was started {len(failed)} times from step {step} and never came to another "
        f"checkpoint. The last error: {faults[-1] if faults else 'it died without a word'}",
        remedy=f"Mend the cause, then `jepa resume {run_dir} --retry`, or change its config.yaml.",
    )


def _config_digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / CONFIG_FILE).read_bytes()).hexdigest()[:16]


def _note_start(run_dir: Path, launch: Launch, step: int, info: dict[str, Any]) -> int:
    # When the process was started, not when it came here: imports are part of what a start costs.
    began = datetime.fromtimestamp(time.time() - process_age_seconds(), UTC)
    entry = {
        "time": began.isoformat(timespec="milliseconds"),
        "step": step,
        "world_size": launch.world_size,
        "launcher": launch.launcher,
        "config": _config_digest(run_dir),
        "code": git_commit(Path(__file__).parent),
        "machine": machine(),
    }
    starts = [*info.get("starts", []), entry]
    write_json(run_dir / RUN_FILE, {**info, "world_size": launch.world_size, "starts": starts})
    return len(starts)


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
