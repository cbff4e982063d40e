"""The guarded bottom of reading a dataset: descriptors, the mapped index, arrays from bytes."""

import io
import os
import stat
import tokenize
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from pipeline.data.layout import INDEX_DTYPE, MAX_MEMBER_BYTES, Member, ShardEntry
from pipeline.data.manifest import PREPARE_AGAIN
from pipeline.errors import DataError, StorageError

# NumPy reads a header as Python source; one that is damaged fails in the middle of that.
_BAD_HEADER = (ValueError, EOFError, SyntaxError, tokenize.TokenError)


class Descriptor:
    """A regular file opened for positioned reads, closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        # Without O_NONBLOCK a pipe in a shard's place would block the open for ever.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OSError(f"{path} is not a regular file")

    def read(self, length: int, offset: int) -> bytes:
        """`length` bytes from `offset`; fewer only at the end of the file."""
        parts: list[bytes] = []
        while length > 0:
            part = os.pread(self._fd, length, offset)
            if not part:
                break
            parts.append(part)
            length -= len(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def map_records(path: Path) -> np.ndarray:
    """The index as a read-only memory map of `INDEX_DTYPE`, one row per sample.

    Raises:
        StorageError: It cannot be read.
        DataError: It is no array, or of another type.
    """
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _BAD_HEADER as error:
        raise DataError(f"{path}: not an index: {error}", remedy=PREPARE_AGAIN) from error
    if not isinstance(records, np.ndarray) or records.dtype != INDEX_DTYPE or records.ndim != 1:
        raise DataError(f"{path}: not an index of this version", remedy=PREPARE_AGAIN)
    return records


def check_places(
    records: np.ndarray, shards: Sequence[ShardEntry], required: Collection[str], name: Path
) -> None:
    """Checks that every member of every sample lies inside its shard and is not too large.

    Raises:
        DataError: One does not.
    """
    if len(records) == 0:
        return
    sizes = np.array([shard.bytes for shard in shards], dtype=np.uint64)
    numbers = records["shard"]
    if numbers.max() >= len(sizes):
        raise DataError(f"{name}: names shard {numbers.max()}", remedy=PREPARE_AGAIN)
    limits = sizes[numbers]
    for member in Member:
        offsets = records[str(member)]["offset"]
        lengths = records[str(member)]["length"].astype(np.uint64)
        # Not offset + length > limit: a hostile offset near 2^64 would wrap around.
        wrong = (offsets > limits) | (lengths > limits - np.minimum(offsets, limits))
        wrong |= lengths > MAX_MEMBER_BYTES[member]
        if member is Member.VIDEO or member in required:
            wrong |= lengths == 0
        if wrong.any():
            raise DataError(
                f"{name}: {member} of sample {int(wrong.argmax())} does not lie in its shard",
                remedy=PREPARE_AGAIN,
            )


def parse_array(payload: bytes, dtype: np.dtype[Any], num_dimensions: int) -> np.ndarray:
    """A `.npy` payload as a finite array of exactly that type.

    The header is checked against the payload's size before anything is allocated.

    Raises:
        ValueError: It is something else.
    """
    stream = io.BytesIO(payload)
    version = npy_format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    try:
        shape, fortran_order, found = npy_format.read_array_header_1_0(stream)
    except _BAD_HEADER as error:
        raise ValueError(f"damaged header: {error}") from error
    if found != dtype or len(shape) != num_dimensions or fortran_order:
        raise ValueError(f"expected {dtype} with {num_dimensions} dimensions, got {found} {shape}")
    content = payload[stream.tell() :]
    num_items = 1
    for length in shape:
        num_items *= length
    if len(content) != num_items * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes for shape {shape}")
    array = np.frombuffer(content, dtype=dtype).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError("not finite")
    return array
