"""Append-only files of one JSON object per line, written so that a kill loses one line at most."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.redact import without_secrets


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLines:
    """The whole lines of a file from some byte on."""

    records: tuple[dict[str, Any], ...]
    num_unreadable: int
    """Whole lines that hold no JSON object."""
    end: int
    """Byte after the last whole line: where to read on later."""


class JsonLinesWriter:
    """Appends records; each is in the operating system's hands when `write` returns.

    A torn last line, left by a kill in the middle of a write, is cut off on opening: it was
    never whole, and the next record must not be glued to it.

    Args:
        path: The file; created with its first record.

    Raises:
        StorageError: If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            _cut_torn_line(path)
            # Unbuffered: a line that could not be written leaves nothing to fail again later.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(f"Cannot open {path} for writing: {error}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; secrets are blanked, and numbers that are not finite become null.

        Raises:
            StorageError: If the line cannot be written, for instance on a full disk.
        """
        text = json.dumps(
            _without_non_finite(without_secrets(record)), allow_nan=False, ensure_ascii=False
        )
        line = text.encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise StorageError(f"Cannot write to {self._path}: {error}") from error
        if written != len(line):
            raise StorageError(f"Only half of a line went into {self._path}: is the disk full?")

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()


def read_json_lines(path: Path, start: int = 0, max_bytes: int = -1) -> JsonLines:
    """Reads the whole lines of a file that may be growing; a torn last line is left alone.

    Args:
        path: The file; one that does not exist reads as empty.
        start: Byte to begin at, the `end` of an earlier reading.
        max_bytes: Read at most this much, which must exceed the longest line; all by default.

    Raises:
        StorageError: If the file is there but cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(max_bytes)
    except FileNotFoundError:
        return JsonLines(records=(), num_unreadable=0, end=start)
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error}") from error
    whole = content[: content.rfind(b"\n") + 1]
    parsed = [_parse(line) for line in whole.splitlines() if line.strip()]
    records = tuple(record for record in parsed if record is not None)
    return JsonLines(
        records=records, num_unreadable=len(parsed) - len(records), end=start + len(whole)
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        content_end = file.seek(0, 2)
        # Lines are far shorter than this, so the last newline is in the last block.
        block_start = max(0, content_end - 2**20)
        file.seek(block_start)
        block = file.read(content_end - block_start)
        whole_end = block_start + block.rfind(b"\n") + 1
        if whole_end < content_end:
            file.truncate(whole_end)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
