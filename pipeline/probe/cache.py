"""Features on disk: encoded once for an encoder and a split, found again by what they come from."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from pipeline.errors import StorageError
from pipeline.files import write_atomically
from pipeline.probe.chunks import (
    Chunk,
    ChunkedTokens,
    Extraction,
    encode_chunk,
    read_chunk,
    read_steps,
)
from pipeline.probe.features import Features

_META = "features.json"
_IN_USE = "in-use"
_GIB = 2**30


def extract(asked: Extraction, cache: Path, report: Callable[[int, int], None]) -> Features:
    """Features of a split: what is in the cache from there, the rest encoded now and put there.

    Args:
        asked: Which features.
        cache: Folder of all cached features; may be emptied at any time.
        report: Told the number of videos done, and their total.

    Raises:
        DataError: Too many videos cannot be decoded.
        StorageError: The folder cannot be written.
    """
    asked, folder = open_folder(asked, cache)
    held = _hold(folder)
    total = len(asked.split.videos)
    chunks: list[Chunk] = []
    num_encoded = num_done = 0
    for number, places in enumerate(asked.chunks()):
        chunk = read_chunk(asked, folder, number)
        if chunk is None:
            chunk = encode_chunk(asked, folder, number)
            num_encoded += 1
        chunks.append(chunk)
        check_budget(asked, chunks)
        num_done += len(places)
        report(num_done, total)
    return replace(_features(asked, chunks, from_cache=num_encoded == 0), held=held)


def open_folder(asked: Extraction, cache: Path) -> tuple[Extraction, Path]:
    """The folder of some features, made if need be, and what is in it.

    Features with tokens also serve where none are needed.

    Raises:
        StorageError: It cannot be made.
    """
    with_tokens = replace(asked, keep_tokens=True)
    if not asked.keep_tokens and is_complete(with_tokens, cache):
        asked = with_tokens
    folder = cache / asked.key()
    told = {
        "task": asked.task.name,
        "split": asked.split.name,
        "encoder": asked.encoder.digest,
        "videos": len(asked.split.videos),
        "chunks": len(asked.chunks()),
        "tokens": asked.keep_tokens,
        "gib": round(asked.total_gib, 3),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _META, json.dumps(told))
    except OSError as error:
        raise StorageError(f"cannot keep features in {cache}: {error.strerror or error}") from error
    return asked, folder


def missing_chunks(asked: Extraction, folder: Path) -> list[int]:
    """Numbers of the chunks that are not there, or not whole."""
    numbers = range(len(asked.chunks()))
    return [number for number in numbers if read_chunk(asked, folder, number) is None]


def is_complete(asked: Extraction, cache: Path) -> bool:
    """Whether nothing would have to be encoded."""
    folder = cache / asked.key()
    return folder.is_dir() and not missing_chunks(asked, folder)


def check_budget(asked: Extraction, chunks: Iterable[Chunk]) -> None:
    """Stops once more videos are bad than the task tolerates.

    Raises:
        DataError: They are.
    """
    found = [fault for chunk in chunks for fault in chunk.faults]
    asked.split.check_faults((*asked.split.faults, *found))


def prune(cache: Path, limit_gib: float, keep: Iterable[str] = ()) -> None:
    """Remove the features used longest ago until the folder keeps to a size.

    What another process encodes or reads stays, too.

    Args:
        cache: Folder of all cached features.
        limit_gib: Its size.
        keep: Keys of features that are in use and stay.
    """
    folders = [path.parent for path in cache.glob(f"*/{_META}")]
    sizes = {folder: _num_bytes(folder) for folder in folders}
    kept = set(keep)
    for folder in sorted(folders, key=lambda folder: (folder / _META).stat().st_mtime):
        if sum(sizes.values()) <= limit_gib * _GIB:
            return
        if folder.name not in kept and not _in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]


def _hold(folder: Path) -> IO[bytes]:
    """Says that a folder is in use, until the file is closed or the process ends."""
    file = (folder / _IN_USE).open("ab")
    # Where storage has no locks, pruning by another process is noticed at the next read.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def _in_use(folder: Path) -> bool:
    """Whether a process has said that it uses a folder."""
    try:
        with (folder / _IN_USE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _features(asked: Extraction, chunks: list[Chunk], *, from_cache: bool) -> Features:
    index = [place for chunk in chunks for place in chunk.positions]
    steps = [part for chunk in chunks if (part := read_steps(chunk)) is not None]
    return Features(
        steps_NVPCD=torch.cat(steps) if steps else torch.zeros(0, asked.num_views, 1, 1, 1),
        tokens=ChunkedTokens(chunks) if asked.keep_tokens else None,
        labels_N=torch.tensor([asked.split.videos[place].label for place in index]),
        index_N=torch.tensor(index),
        faults=tuple(fault for chunk in chunks for fault in chunk.faults),
        from_cache=from_cache,
    )


def _num_bytes(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries)
