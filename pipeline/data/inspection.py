"""What is left of a damaged shard, counted against the index instead of believed from the tar.

A tar reader takes a damaged header for the end of the archive and reports fewer samples without a
word. The index knows how many there have to be and what each of their bytes sums up to.
"""

import hashlib
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.layout import Member, ShardEntry
from pipeline.data.rawfile import Descriptor

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardDamage:
    """A shard that is not what the manifest says, and how many of its samples are whole."""

    name: str
    num_samples: int
    num_whole: int
    trouble: str
    """What differs, such as `size is 3000 instead of 20480 bytes, digest differs`."""

    def __str__(self) -> str:
        return f"shard {self.name}: {self.num_whole} of {self.num_samples} samples, {self.trouble}"


def inspect_shards(
    folder: Path, shards: Sequence[ShardEntry], records: np.ndarray, *, everything: bool
) -> dict[int, ShardDamage]:
    """The damaged shards of a dataset, by number.

    Args:
        folder: The dataset.
        shards: The manifest's entries.
        records: The whole index.
        everything: Compare every shard's digest, at the price of reading all of it. Otherwise
            only those that are missing or of another size are read.
    """
    found = {}
    for number, entry in enumerate(shards):
        trouble = _trouble(folder / entry.name, entry, everything=everything)
        if trouble:
            own = records[records["shard"] == number]
            found[number] = ShardDamage(
                name=entry.name,
                num_samples=len(own),
                num_whole=_num_whole(folder / entry.name, own),
                trouble=trouble,
            )
    return found


def _trouble(path: Path, entry: ShardEntry, *, everything: bool) -> str:
    try:
        status = path.stat()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no regular file"
    words = []
    if status.st_size != entry.bytes:
        words.append(f"size is {status.st_size} instead of {entry.bytes} bytes")
    if (words or everything) and _digest(path) != entry.sha256:
        words.append("digest differs")
    return ", ".join(words)


def _digest(path: Path) -> str:
    """Hex SHA-256, or nothing where the file cannot be read to its end."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _num_whole(path: Path, records: np.ndarray) -> int:
    try:
        shard = Descriptor(path)
    except OSError:
        return 0
    return sum(_is_whole(shard, row) for row in records)


def _is_whole(shard: Descriptor, row: np.void) -> bool:
    return all(
        _checksum(shard, int(row[name]["offset"]), int(row[name]["length"])) == row[name]["crc32"]
        for name in map(str, Member)
    )


def _checksum(shard: Descriptor, offset: int, length: int) -> int | None:
    """CRC-32 of a part of a shard, read in pieces; None if it is not all there."""
    checksum = 0
    for begin in range(offset, offset + length, _CHUNK_BYTES):
        wanted = min(_CHUNK_BYTES, offset + length - begin)
        try:
            piece = shard.read(wanted, begin)
        except OSError:
            return None
        if len(piece) != wanted:
            return None
        checksum = zlib.crc32(piece, checksum)
    return checksum
