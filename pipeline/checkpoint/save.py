"""The commit: all files of a step become one checkpoint at once, or none of them does.

Every rank writes into a folder with a partial name and leaves a note with size and digest of each
file. When all notes are there, rank 0 writes the manifest, renames the folder and only then moves
the pointer. A kill at any moment leaves the previous commit as it was.

Nothing here is a collective, so that all of it can go on behind the training.
"""

import contextlib
import errno
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.checkpoint import layout
from pipeline.checkpoint.fingerprint import combine_ranks
from pipeline.checkpoint.layout import FileEntry, Manifest
from pipeline.checkpoint.notes import collect_notes, leave_note, remove_notes
from pipeline.files import sha256_of, sync_file, sync_folder, write_atomically

# What is left free beside a save: other files of the run grow meanwhile.
_SPARE = 1.2
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveRequest:
    """What is to be committed, the same on all ranks except `rank`, `num_bytes` and `write`."""

    run_dir: Path
    run_id: str
    step: int
    parent_step: int | None
    versions: dict[str, str]
    write: Callable[[Path], dict[str, int] | None]
    """Writes all files of this rank into the empty folder given; gives its part of the tensors'
    fingerprints."""
    rank: int = 0
    world_size: int = 1
    token: str = ""
    """Tells this save from every other of the step, also from one that another job is at."""
    fence: int = 0
    """Number of the lease under which the run is owned."""
    may_publish: Callable[[], None] = lambda: None
    """Called before the checkpoint gets its name; raises if the run has another owner by now."""
    num_bytes: int = 0
    """What this rank is going to write, about."""
    retries: int = 0
    """Further attempts where the file system refused."""
    timeout_seconds: float = 1800.0
    """How long rank 0 waits for the other ranks' notes."""
    give_up: threading.Event = field(default_factory=threading.Event)
    """Set by whoever no longer wants the save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveResult:
    """How a save ended; of ranks other than the first, how their own part did."""

    step: int
    failure: str | None
    """Which rank failed and why, or None."""
    num_bytes: int = 0
    """Of all ranks."""
    retried: tuple[str, ...] = ()
    """What was refused at first and done at a later attempt."""


def save(request: SaveRequest) -> SaveResult:
    """Writes this rank's files; on rank 0, waits for the others and publishes the checkpoint.

    Returns:
        The outcome. After a failure nothing of this step remains and the previous commit stands.

    Raises:
        JepaError: `may_publish` forbade it.
    """
    final = layout.checkpoints_dir(request.run_dir) / layout.commit_name(request.step)
    words = "-".join(word for word in (request.run_id, request.token) if word)
    partial = final.with_name(f"{final.name}.partial-{words}")
    own = _own_part(request, partial)
    if request.rank:
        return _result(request, [own])
    notes = {0: own}
    if request.world_size > 1:
        notes = collect_notes(
            partial,
            request.world_size,
            timeout_seconds=request.timeout_seconds,
            give_up=request.give_up,
        )
    missing = [rank for rank in range(request.world_size) if rank not in notes]
    result = _result(request, [notes[rank] for rank in sorted(notes)], missing)
    try:
        if result.failure is None:
            result = _publish_patiently(request, partial, final, notes, result)
    finally:
        # After a failure, or when another job owns the run by now.
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    return result


def _own_part(request: SaveRequest, partial: Path) -> dict[str, Any]:
    """Writes this rank's files and leaves its note."""
    note: dict[str, Any] = {"rank": request.rank, "files": [], "fingerprints": {}}

    def attempt() -> None:
        entries, fingerprints = _write_own(request, partial)
        note.update(files=[asdict(entry) for entry in entries], fingerprints=fingerprints)

    note["failure"], note["retried"] = _patiently(attempt, request, partial)
    with contextlib.suppress(OSError):  # rank 0 misses the note, which is a failure as well
        if request.world_size > 1:
            leave_note(partial, request.rank, note)
    return note


def _patiently(
    action: Callable[[], None], request: SaveRequest, partial: Path
) -> tuple[str | None, list[str]]:
    """Tries again where the file system refuses; tells why it gave up, and what it went over."""
    refused: list[str] = []
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            action()
        except (OSError, RuntimeError) as error:
            # torch and safetensors report some of what the system refuses as RuntimeError.
            refused.append(f"rank {request.rank}: {_reason(error, partial)}")
        else:
            return None, refused
        if len(refused) > request.retries or request.give_up.wait(pause):
            return refused[-1], refused[:-1]
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _write_own(request: SaveRequest, partial: Path) -> tuple[list[FileEntry], dict[str, int]]:
    # Ranks write into folders of their own first: only so does each know which files are its.
    own = partial / f"rank-{request.rank}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    _check_space(request)
    fingerprints = request.write(own) or {}
    entries = [_entry(path, own) for path in _files(own)]
    for entry in entries:
        target = partial / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        (own / entry.path).replace(target)
    shutil.rmtree(own)
    return entries, fingerprints


def _check_space(request: SaveRequest) -> None:
    # Rank 0 asks for all; each of the others only for its own part, since the rest of the space
    # may be in use already when it asks.
    ranks = request.world_size if request.rank == 0 else 1
    need = _SPARE * request.num_bytes * ranks
    folder = layout.checkpoints_dir(request.run_dir)
    free = shutil.disk_usage(folder).free
    if need > free:
        words = f"no space: need {_mib(need)}, have {_mib(free)}"
        raise OSError(errno.ENOSPC, words, str(folder))


def _result(
    request: SaveRequest, notes: list[dict[str, Any]], missing: Iterable[int] = ()
) -> SaveResult:
    failures = [note["failure"] for note in notes if note["failure"] is not None]
    waited = f"{request.timeout_seconds:.0f} s"
    failures += [f"rank {rank}: gave no word within {waited}" for rank in missing]
    return SaveResult(
        step=request.step,
        failure="; ".join(failures) or None,
        num_bytes=sum(entry["num_bytes"] for note in notes for entry in note["files"]),
        retried=tuple(words for note in notes for words in note["retried"]),
    )


def _publish_patiently(
    request: SaveRequest,
    partial: Path,
    final: Path,
    notes: dict[int, dict[str, Any]],
    result: SaveResult,
) -> SaveResult:
    entries = [FileEntry(**entry) for note in notes.values() for entry in note["files"]]
    manifest = Manifest(
        schema_version=layout.SCHEMA_VERSION,
        run_id=request.run_id,
        step=request.step,
        world_size=request.world_size,
        parent_step=request.parent_step,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=request.versions,
        files=tuple(sorted(entries, key=lambda entry: entry.path)),
        fingerprints=combine_ranks(note["fingerprints"] for note in notes.values()),
        fence=request.fence,
    )
    failure, retried = _patiently(
        lambda: _publish(request, partial, final, manifest), request, partial
    )
    return SaveResult(
        step=result.step,
        failure=failure,
        num_bytes=result.num_bytes,
        retried=(*result.retried, *retried),
    )


def _publish(request: SaveRequest, partial: Path, final: Path, manifest: Manifest) -> None:
    if partial.exists():  # else an earlier attempt was refused only after the name was given
        remove_notes(partial, request.world_size)
        for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
            sync_folder(folder)
        write_atomically(partial / layout.MANIFEST, manifest.to_json())
        request.may_publish()
        partial.rename(final)
    sync_folder(final.parent)
    # A hint only: the commit stands without it.
    with contextlib.suppress(OSError):
        write_atomically(final.parent / layout.LATEST, final.name + "\n")


def _reason(error: OSError | RuntimeError, partial: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or partial})"
    free = shutil.disk_usage(partial.parent).free
    return f"{str(error).splitlines()[0]} ({partial}; {_mib(free)} free)"


def _entry(path: Path, root: Path) -> FileEntry:
    sync_file(path)
    return FileEntry(
        path=path.relative_to(root).as_posix(),
        num_bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )


def _files(root: Path) -> Iterable[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
