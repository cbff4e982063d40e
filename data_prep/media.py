"""The bytes of a source, wherever they lie: a file, a part of a tar, an address."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_prep.records import Source
from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.manifest import file_sha256
from pipeline.errors import StorageError

# Members are held in memory; one that is larger belongs into a file of its own.
_MAX_MEMBER_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 22
_PAUSES_SECONDS = (1.0, 4.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A source that can be read."""

    content: Path | bytes
    sha256: str


def is_remote(locator: str) -> bool:
    """Whether a locator is an address and no path of this machine."""
    return "://" in locator


@contextmanager
def opened(source: Source, folder: Path) -> Iterator[Opened]:
    """A source's bytes for the duration of a `with` block.

    Args:
        source: What to open.
        folder: Where what has to be fetched is kept meanwhile.

    Raises:
        BadMediaError: It is not there any more, or cannot be read.
        OSError: `folder` cannot be written.
    """
    if source.member_offset is not None:
        content = _member(source)
        yield Opened(content=content, sha256=hashlib.sha256(content).hexdigest())
    elif is_remote(source.locator):
        fetched = folder / f"fetched-{os.getpid()}.partial"
        try:
            _fetch(source, fetched)
            yield Opened(content=fetched, sha256=file_sha256(fetched))
        finally:
            fetched.unlink(missing_ok=True)
    else:
        path = Path(source.locator)
        yield Opened(content=path, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    if not path.is_file():
        # A pipe in a video's place would block whoever reads it.
        raise BadMediaError(BadReason.NOT_A_FILE, "no file, or a device, pipe or folder")
    try:
        return file_sha256(path)
    except StorageError as error:
        raise BadMediaError(BadReason.NOT_A_FILE, str(error)) from error


def _member(source: Source) -> bytes:
    if source.num_bytes > _MAX_MEMBER_BYTES:
        raise BadMediaError(
            BadReason.TOO_MANY_BYTES,
            f"{source.num_bytes} bytes in a tar, the limit is {_MAX_MEMBER_BYTES}",
        )
    import fsspec  # noqa: PLC0415 - only where a source is remote or lies in a tar

    try:
        filesystem, path = fsspec.core.url_to_fs(source.locator)
        with filesystem.open(path, "rb") as file:
            file.seek(source.member_offset or 0)
            content = file.read(source.num_bytes)
    except (OSError, ValueError) as error:
        raise BadMediaError(BadReason.NOT_A_FILE, f"cannot be read: {error}") from error
    if len(content) != source.num_bytes:
        raise BadMediaError(BadReason.DAMAGED, f"the tar ends after {len(content)} of its bytes")
    return content


def _fetch(source: Source, path: Path) -> None:
    """Copies what lies at an address; a network may fail, or end too early, a few times."""
    for pause in (*_PAUSES_SECONDS, None):
        try:
            with path.open("wb") as file:
                _copy(source, file)
        except BadMediaError:
            if pause is None:
                raise
            time.sleep(pause)
        else:
            return


def _copy(source: Source, file: BinaryIO) -> None:
    """Not more bytes than were listed, where the size is known: a stream may have no end."""
    num_bytes = 0
    for chunk in _chunks(source.locator):
        file.write(chunk)
        num_bytes += len(chunk)
        if 0 < source.num_bytes < num_bytes:
            break
    if source.num_bytes not in (0, num_bytes):
        raise BadMediaError(
            BadReason.NOT_A_FILE,
            f"cannot be fetched: expected {source.num_bytes} bytes, got {num_bytes}"
            + (" or more" if num_bytes > source.num_bytes else ""),
        )


def _chunks(address: str) -> Iterator[bytes]:
    """The bytes at an address; what goes wrong there is the source's fault, not the disk's."""
    import fsspec  # noqa: PLC0415 - only where a source is remote

    try:
        filesystem, path = fsspec.core.url_to_fs(address)
        with filesystem.open(path, "rb") as remote:
            chunk = remote.read(_CHUNK_BYTES)
            while chunk:
                yield chunk
                chunk = remote.read(_CHUNK_BYTES)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise BadMediaError(BadReason.NOT_A_FILE, f"cannot be fetched: {error}") from error
