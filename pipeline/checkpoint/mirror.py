"""Commits of a run's folder carried to its store behind the training, and back when it is lost."""

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import CheckpointConfig, FileEntry
from pipeline.checkpoint.load import Rejected, verify
from pipeline.checkpoint.notes import collect_notes, leave_note
from pipeline.checkpoint.retain import is_pinned, unwanted_steps
from pipeline.checkpoint.save import SaveRequest
from pipeline.checkpoint.store import CommitStore
from pipeline.checkpoint.wishes import read_wishes
from pipeline.errors import CheckpointError, StorageError
from pipeline.files import publish, write_atomically

# What a resume needs of a run's folder besides a checkpoint.
_RECORDS = ("config.yaml", "run.json")
_POLL_SECONDS = 0.05


def upload(store: CommitStore, request: SaveRequest, config: CheckpointConfig) -> str | None:
    """Carries a published commit to the store; every rank of the save calls it.

    Ranks upload different files and leave each other notes; rank 0 sets the marker when all are
    there, and removes from the store what the settings no longer want.

    Returns:
        On rank 0 what went wrong, if anything did; the local commit stands in any case.
    """
    checkpoints = layout.checkpoints_dir(request.run_dir)
    commit = checkpoints / layout.commit_name(request.step)
    notes = checkpoints / f"{commit.name}.partial-upload-{request.token}"
    deadline = time.monotonic() + request.timeout_seconds
    try:
        if request.rank == 0:
            _clear_the_way(store, request)
            notes.mkdir()
        if not _appears(notes, deadline, request.give_up):
            return None  # rank 0 has given up, and says why
        failure = _put_own(store, request, commit)
        leave_note(notes, request.rank, {"failure": failure})
        if request.rank:
            return None
        found = collect_notes(
            notes,
            request.world_size,
            timeout_seconds=max(0.0, deadline - time.monotonic()),
            give_up=request.give_up,
        )
        failures = [note["failure"] for note in found.values() if note["failure"]]
        if failures or len(found) < request.world_size:
            return "; ".join(failures) or "some ranks gave no word of their uploads"
        _mark(store, request, commit)
        _prune(store, request.run_dir, config)
    except (OSError, StorageError) as error:
        return str(error)
    finally:
        if request.rank == 0:
            shutil.rmtree(notes, ignore_errors=True)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A commit that was brought back from the store."""

    step: int
    rejected: tuple[Rejected, ...]
    """Newer ones that were not what their manifests say."""


def restore(store: CommitStore, run_dir: Path, step: int | None = None) -> Restored | None:
    """Brings a run's newest whole commit, and its records, back into its folder.

    Several processes may call it: one does it, the others wait and find it done.

    Args:
        store: Of this run.
        run_dir: The run's folder; it need not be there.
        step: The commit to bring; the newest that verifies otherwise.

    Returns:
        What was brought; None if the folder has a commit of its own by now.

    Raises:
        CheckpointError: The store has no such commit, none is whole, or it is of another run.
        StorageError: The store or the file system refuses.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with _alone(run_dir.with_name(f".{run_dir.name}.restore")):
        there = [commit.step for commit in layout.list_commits(run_dir)]
        if there if step is None else step in there:
            return None
        _bring_records(store, run_dir)
        rejected = []
        for candidate in _candidates(store, step):
            problems = _bring(store, run_dir, candidate)
            if not problems:
                return Restored(step=candidate, rejected=tuple(rejected))
            where = Path(f"{store.url}/{layout.commit_name(candidate)}")
            commit = layout.Commit(step=candidate, path=where)
            rejected.append(Rejected(commit=commit, reasons=tuple(problems)))
        lines = [f"step {bad.commit.step}: {'; '.join(bad.reasons)}" for bad in rejected]
        raise CheckpointError(f"No checkpoint below {store.url} is whole.\n  " + "\n  ".join(lines))


def _clear_the_way(store: CommitStore, request: SaveRequest) -> None:
    owner = store.run_id()
    if owner not in (None, request.run_id):
        raise StorageError(
            f"{store.url} holds checkpoints of another run, {owner}; nothing was written there.",
            remedy="Choose another checkpoint.store or name=….",
        )
    # Commits from here on are those of a line that a resume has left.
    store.set_aside_from(request.step)
    store.clear(request.step)
    for name in _RECORDS:
        if (request.run_dir / name).is_file():
            store.write(name, (request.run_dir / name).read_bytes())


def _put_own(store: CommitStore, request: SaveRequest, commit: Path) -> str | None:
    """Uploads this rank's share of the commit's files."""
    try:
        manifest = layout.read_manifest(commit)
        for entry in _share(manifest.files, request.rank, request.world_size):
            store.put(request.step, entry.path, commit / entry.path)
    except (OSError, StorageError, CheckpointError) as error:
        return f"rank {request.rank}: {error}"
    return None


def _share(files: tuple[FileEntry, ...], rank: int, world_size: int) -> list[FileEntry]:
    by_size = sorted(files, key=lambda entry: (-entry.num_bytes, entry.path))
    return by_size[rank::world_size]


def _mark(store: CommitStore, request: SaveRequest, commit: Path) -> None:
    request.may_publish()
    store.mark(request.step, (commit / layout.MANIFEST).read_bytes())


def _prune(store: CommitStore, run_dir: Path, config: CheckpointConfig) -> None:
    pinned = {commit.step for commit in layout.list_commits(run_dir) if is_pinned(commit)}
    kept = pinned | set(read_wishes(run_dir).keep)
    for step in unwanted_steps(store.steps(), config):
        if step not in kept:
            store.clear(step)


def _appears(path: Path, deadline: float, give_up: threading.Event) -> bool:
    while not path.exists():
        if time.monotonic() > deadline or give_up.wait(_POLL_SECONDS):
            return False
    return True


def _bring_records(store: CommitStore, run_dir: Path) -> None:
    run_id = store.run_id()
    local = run_dir / "run.json"
    if run_id is None:
        raise CheckpointError(
            f"{store.url} holds no run.",
            remedy="Check checkpoint.store and the run's name, or start it with `jepa train`.",
        )
    if local.is_file() and json.loads(local.read_text()).get("run_id") != run_id:
        raise CheckpointError(f"{run_dir} and {store.url} are two runs of the same name.")
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in _RECORDS:
        content = store.read(name)
        if content is not None and not (run_dir / name).exists():
            write_atomically(run_dir / name, content)


def _candidates(store: CommitStore, step: int | None) -> list[int]:
    steps = store.steps()
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(f"{store.url} has no {wanted}; there are: {there}.")
    return [step] if step is not None else steps[::-1]


def _bring(store: CommitStore, run_dir: Path, step: int) -> list[str]:
    """Downloads and verifies a commit; tells what is wrong with it, and publishes it otherwise."""
    final = layout.checkpoints_dir(run_dir) / layout.commit_name(step)
    partial = final.with_name(f"{final.name}.partial-fetched-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        try:
            store.fetch(step, partial)
        except CheckpointError as error:
            return [str(error)]
        problems = verify(partial)
        if not problems:
            publish(partial, final)
        return problems
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
