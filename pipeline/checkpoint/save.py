"""The commit: all files of a step become one checkpoint at once, or none of them does.

Every rank writes into a folder with a partial name and reports size and digest of each file. When
all ranks have, rank 0 writes the manifest, renames the folder and only then moves the pointer. A
kill at any moment leaves the previous commit as it was.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import FileEntry, Manifest
from pipeline.files import sha256_of, sync_file, sync_folder, write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveRequest:
    """What is to be committed, the same on all ranks except `write`'s doing."""

    run_dir: Path
    run_id: str
    step: int
    parent_step: int | None
    versions: dict[str, str]
    write: Callable[[Path], None]
    """Writes all files of this rank into the folder given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveResult:
    """How a save ended, agreed by all ranks."""

    step: int
    failure: str | None
    """Which rank failed and why, or None."""
    num_bytes: int = 0


def save(request: SaveRequest) -> SaveResult:
    """Writes and publishes a checkpoint; every rank calls it at the same step.

    Returns:
        The outcome, the same on all ranks. After a failure nothing of this step remains and the
        previous commit stands.
    """
    folder = layout.checkpoints_dir(request.run_dir)
    final = folder / layout.commit_name(request.step)
    partial = folder / f"{final.name}.partial-{request.run_id}"
    problem = _on_rank_0(lambda: _prepare(partial, _world_size()))
    if problem is not None:
        return SaveResult(step=request.step, failure=problem)
    entries, problem = _write_own(request, partial)
    outcomes = _gather((entries, problem))
    failures = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(outcomes) if why is not None]
    if not failures:
        moved = _gather(_move_up(partial, entries))
        failures = [f"rank {rank}: {why}" for rank, why in enumerate(moved) if why is not None]
    if failures:
        _on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
        return SaveResult(step=request.step, failure="; ".join(failures))
    files = {entry.path: entry for entries, _ in outcomes for entry in entries}
    manifest = Manifest(
        schema_version=layout.SCHEMA_VERSION,
        run_id=request.run_id,
        step=request.step,
        world_size=len(outcomes),
        parent_step=request.parent_step,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=request.versions,
        files=tuple(files[path] for path in sorted(files)),
    )
    problem = _on_rank_0(lambda: _publish(partial, final, manifest))
    if problem is not None:
        _on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
    num_bytes = sum(entry.num_bytes for entry in manifest.files)
    return SaveResult(step=request.step, failure=problem, num_bytes=num_bytes)


def prune(run_dir: Path, config: layout.CheckpointConfig) -> list[int]:
    """Removes commits that are no longer wanted; called by rank 0 after a commit.

    Returns:
        Steps that were removed.
    """
    commits = layout.list_commits(run_dir)
    every = config.keep_every_steps
    removed = []
    for commit in commits[1 : -config.keep_last]:
        if every is None or commit.step % every:
            # Out of the list of commits first: half a removal must not look like a checkpoint.
            doomed = commit.path.with_name(f"{commit.path.name}.partial-removed")
            commit.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(commit.step)
    return removed


def set_aside_after(run_dir: Path, step: int) -> list[str]:
    """Renames commits newer than `step`, so that a run which goes on from there leads on alone.

    They stay on disk as `aside-…`: nothing takes them for checkpoints, a person can rename them
    back or remove them. Called by rank 0.

    Returns:
        Their new names.
    """
    names = []
    for commit in layout.list_commits(run_dir):
        if commit.step > step:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
            target = commit.path.with_name(f"aside-{commit.path.name}-{stamp}")
            commit.path.rename(target)
            names.append(target.name)
    return names


def clear_partials(run_dir: Path) -> list[str]:
    """Removes saves that were cut short; called by rank 0 before a run goes on."""
    partials = layout.list_partials(run_dir)
    for partial in partials:
        shutil.rmtree(partial, ignore_errors=True)
    return [partial.name for partial in partials]


def _prepare(partial: Path, world_size: int) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for rank in range(world_size):
        _own_folder(partial, rank).mkdir(parents=True)


def _write_own(request: SaveRequest, partial: Path) -> tuple[list[FileEntry], str | None]:
    # Ranks write into folders of their own first: only so does each know which files are its.
    own = _own_folder(partial, _rank())
    try:
        request.write(own)
        return [_entry(path, own) for path in _files(own)], None
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        return [], _reason(error, partial)


def _move_up(partial: Path, entries: list[FileEntry]) -> str | None:
    own = _own_folder(partial, _rank())
    try:
        for entry in entries:
            target = partial / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (own / entry.path).rename(target)
        shutil.rmtree(own)
    except OSError as error:
        return _reason(error, partial)
    return None


def _own_folder(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank}"


def _reason(error: OSError | RuntimeError, partial: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or partial})"
    free = shutil.disk_usage(partial.parent).free
    return f"{str(error).splitlines()[0]} ({partial}; {free / 2**20:.0f} MiB free)"


def _entry(path: Path, root: Path) -> FileEntry:
    sync_file(path)
    return FileEntry(
        path=path.relative_to(root).as_posix(),
        num_bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )


def _files(root: Path) -> Iterable[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _publish(partial: Path, final: Path, manifest: Manifest) -> None:
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync_folder(folder)
    write_atomically(partial / layout.MANIFEST, manifest.to_json())
    partial.rename(final)
    sync_folder(final.parent)
    # A hint only: the commit stands without it.
    with contextlib.suppress(OSError):
        write_atomically(final.parent / layout.LATEST, final.name + "\n")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _on_rank_0(action: Callable[[], Any]) -> str | None:
    """Runs `action` on rank 0; all ranks learn whether the file system refused it."""
    problem: list[str | None] = [None]
    if _rank() == 0:
        try:
            action()
        except OSError as error:
            problem[0] = f"rank 0: {error.strerror or error} ({error.filename})"
    if dist.is_initialized():
        dist.broadcast_object_list(problem, src=0)
    return problem[0]
