"""Finished items → one shard: what a Ray task does, from the first copy to the recorded rows."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from webdataset.writer import TarWriter

from pipeline.data.indexing import IndexedShard, index_shard
from pipeline.data.layout import INDEX_DTYPE, ShardEntry
from pipeline.data.manifest import write_durably
from pipeline.errors import DataError, StorageError
from pipeline.files import publish


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """A shard to write."""

    number: int
    items: tuple[tuple[str, tuple[str, ...]], ...]
    """Paths of finished items and the keys that are taken from each, in order."""
    shard: str
    """Path of the shard."""
    rows: str
    """Path of its rows of the index; its entry of the manifest lies beside them as `.json`."""


def pack_shard(job: ShardJob) -> int:
    """Writes, checks and publishes a shard; returns its number.

    The same items give the same bytes, whoever does it and how often.

    Raises:
        StorageError: The dataset's folder cannot be read or written.
        DataError: An item lacks a sample that it had, or what was written is no shard.
    """
    rows, shard = Path(job.rows), Path(job.shard)
    partial = rows.with_suffix(f".{os.getpid()}.partial")
    try:
        rows.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, job)
        indexed = index_shard(partial)
        entry = indexed.entry.model_copy(update={"name": shard.name})
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, indexed.records, version=(1, 0), allow_pickle=False)
        write_durably(rows, buffer.getvalue())
        write_durably(rows.with_suffix(".json"), entry.model_dump_json(indent=1).encode() + b"\n")
        publish(partial, shard)
    except OSError as error:
        raise StorageError(
            f"{error.filename or shard}: cannot be written: {error.strerror or error}",
            remedy="Free space or mend permissions, then run the same command to continue.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return job.number


def packed(shard: Path, rows: Path) -> IndexedShard | None:
    """What the index needs of a published shard; None if it is not there as it was written.

    Its rows stay on disk until they are looked at.
    """
    try:
        entry = ShardEntry.model_validate_json(rows.with_suffix(".json").read_bytes())
        if shard.stat().st_size != entry.bytes:
            return None
        records = np.load(rows, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, ValidationError):
        return None
    if records.dtype != INDEX_DTYPE or len(records) != entry.num_samples:
        return None
    return IndexedShard(entry=entry, records=records)


def _write(partial: Path, job: ShardJob) -> None:
    with partial.open("wb") as file:
        # An integer time: a float costs a header of 1,024 bytes per member.
        writer = TarWriter(file, mtime=0, encoder=False)
        for item, keys in job.items:
            for sample in _samples(Path(item), keys):
                writer.write(sample)
        writer.close()
        file.flush()
        os.fsync(file.fileno())


def _samples(item: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str | bytes]]:
    """The samples of an item, one at a time in memory."""
    with tarfile.open(item, "r:") as tar:
        members: dict[str, list[tarfile.TarInfo]] = {key: [] for key in keys}
        for info in tar:
            members.get(info.name.partition(".")[0], []).append(info)
        for key in keys:
            if not members[key]:
                raise DataError(
                    f"{item}: no sample {key}: its source gives another result than before",
                    remedy="Put the source back as it was, or start over with --overwrite.",
                )
            sample: dict[str, str | bytes] = {"__key__": key}
            for info in members[key]:
                content = tar.extractfile(info)
                sample[info.name.partition(".")[2]] = content.read() if content else b""
            yield sample
