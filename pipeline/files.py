"""Files that are whole or not there, also after a power cut, and the digests that tell them apart.

Functions here raise plain `OSError`: only the caller knows what its file was for.
"""

import hashlib
import os
import threading
import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file so that a reader sees the old content or the new, also after a power cut."""
    # Named after process and thread: two writers of one path must not share a temporary file.
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    temporary = path.with_name(f".{path.name}.{writer}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Removes what killed writers of a file left beside it; for its only writer to call."""
    for leftover in path.parent.glob(f".{path.name}.*-*.partial"):
        leftover.unlink(missing_ok=True)


def create_exclusively(path: Path, text: str) -> bool:
    """Makes a file that did not exist, at once with its content; false if it does exist."""
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}")
    temporary.write_text(text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # No hard links here: exclusive creation is as safe, only that a reader may see it empty.
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(text)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished, synchronised file or folder its final name, and makes the name durable."""
    temporary.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Makes a file's content durable."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
