"""What readers of all kinds share: where a file is, its size and age, mistakes in tables."""

import codecs
import itertools
import math
import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from data_prep.records import Labels, Source
from pipeline.data.layout import Caption
from pipeline.errors import UsageError

VIDEO_SUFFIXES = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts"),
        *(".flv", ".3gp", ".gif", ".ogv", ".wmv", ".asf", ".vob", ".mts"),
    }
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# End of a caption that is about the whole video, whose length is not known yet; ten years.
WHOLE_SECONDS = 3.2e8
_NOT_THERE = "no such file"
_NOT_REACHED = (ImportError, ValueError, PermissionError, ConnectionError, TimeoutError)
_OUR_MODULES = ("builtins", "data_prep", "pipeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """How sources are listed."""

    videos: str | None = None
    """Folder or address that relative paths in tables start from; the table's own if left out."""
    on_other: Callable[[str, str], None] = lambda _name, _reason: None
    """Told the name of everything that was found and is no source, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Size and age of a file."""

    num_bytes: int
    modified_ns: int


def is_remote(locator: str) -> bool:
    """Whether a locator is an address for fsspec and no path of this machine."""
    return "://" in locator


def status_of(locator: str) -> Status | None:
    """Size and age of a file; None if there is no such regular file.

    Raises:
        UsageError: An address cannot be reached at all.
    """
    if not is_remote(locator):
        try:
            found = Path(locator).stat()
        except (OSError, ValueError):
            return None
        return Status(num_bytes=found.st_size, modified_ns=found.st_mtime_ns)
    with reached(locator) as (filesystem, path):
        try:
            return remote_status(filesystem.info(path))
        except FileNotFoundError:
            return None


def remote_status(info: dict[str, Any]) -> Status:
    """Size and age as a file system tells them; the age is 0 where it does not."""
    stamps = [info[name] for name in ("mtime", "LastModified", "created") if name in info]
    stamp = stamps[0] if stamps else 0.0
    seconds = stamp.timestamp() if isinstance(stamp, datetime) else float(stamp)
    return Status(num_bytes=int(info.get("size") or 0), modified_ns=int(seconds * 1e9))


@contextmanager
def reached(address: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address and the path in it.

    Raises:
        UsageError: Its protocol is not installed, or it cannot be reached.
    """
    import fsspec  # noqa: PLC0415 - only where a source is remote

    try:
        yield fsspec.core.url_to_fs(address)
    except Exception as error:
        # What stores' libraries raise for want of credentials has no base class of its own.
        is_theirs = type(error).__module__.partition(".")[0] not in _OUR_MODULES
        if not is_theirs and not isinstance(error, _NOT_REACHED):
            raise
        raise UsageError(
            f"{address}: cannot be reached: {error}",
            remedy="Check the address, its credentials and that fsspec has its protocol installed.",
        ) from error


@contextmanager
def opened_file(locator: str) -> Iterator[IO[bytes]]:
    """A file, local or remote, as bytes.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        if not is_remote(locator):
            with Path(locator).open("rb") as local:
                yield local
            return
        with reached(locator) as (filesystem, path), filesystem.open(path, "rb") as remote:
            yield remote
    except OSError as error:
        raise UsageError(
            f"{locator}: cannot be read: {error.strerror or error}",
            remedy="Correct the source's path.",
        ) from error


def joined(base: str, relative: str) -> str:
    """A path or address that may be relative to a folder or address."""
    if is_remote(relative) or relative.startswith("/"):
        return relative
    if is_remote(base):
        return f"{base.rstrip('/')}/{relative}"
    return os.path.join(base, relative)  # noqa: PTH118 - keeps hostile names as they are


def parent_of(locator: str) -> str:
    """The folder or address that a file lies in."""
    return locator.rpartition("/")[0] if is_remote(locator) else str(Path(locator).parent)


def base_name(locator: str) -> str:
    """The last part of a path or address."""
    return posixpath.basename(locator.rstrip("/"))


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot."""
    return posixpath.splitext(name)[1].lower()


def printable(name: str) -> str:
    """A name as text: file names are bytes, and what is no UTF-8 is written by its number."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def source_at(name: str, locator: str, listing: Listing, why: str, **facts: Any) -> Source | None:
    """The source of a file; None, and noted as no source, if the file is not there.

    Args:
        name: The source's name.
        locator: Path or address of the file.
        listing: Is told if it is missing.
        why: What named the file, such as `train.csv, row 7`.
        facts: Further fields of `Source`.
    """
    status = status_of(locator)
    if status is None:
        listing.on_other(printable(name), f"{why}: {_NOT_THERE}: {printable(locator)}")
        return None
    return Source(
        name=printable(name),
        locator=locator,
        num_bytes=status.num_bytes,
        modified_ns=status.modified_ns,
        **facts,
    )


def about_everything(text: str, source: str) -> tuple[Caption, ...]:
    """One caption of a whole video; none if the text is blank."""
    text = " ".join(text.split())
    if not text:
        return ()
    return (Caption(t0=0.0, t1=WHOLE_SECONDS, text=text, source=source),)


def plain_labels(facts: object) -> Labels:
    """What of a JSON object can be a label: texts and numbers.

    Sidecars are strict JSON in UTF-8, so not a number is left out as a missing value, infinity and
    halves of characters are written as text.
    """
    labels: Labels = {}
    for name, value in facts.items() if isinstance(facts, dict) else ():
        if isinstance(value, float) and not math.isfinite(value):
            if not math.isnan(value):
                labels[str(name)] = str(value)
        elif isinstance(value, str):
            labels[str(name)] = value.encode("utf-8", "backslashreplace").decode()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            labels[str(name)] = value
    return labels


def mistake(file: str, row: int | None, expected: str, got: object) -> UsageError:
    """A mistake in a table or list, said in one way everywhere. Rows count from 1."""
    where = printable(file) if row is None else f"{printable(file)}, row {row}"
    shown = repr(got)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return UsageError(f"{where}: expected {expected}, got {shown}", remedy="Correct the file.")


def rows_of(file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 text, or its NUL-separated parts as `find -print0` writes them."""
    head = file.peek(1 << 16) if hasattr(file, "peek") else b""  # pyright: ignore
    lines = _parts(file) if b"\0" in head else file
    for number, line in zip(itertools.count(1), lines, strict=False):
        raw = line.rstrip(b"\r\n")
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)  # as some editors begin a text
        if raw:
            yield number, os.fsdecode(raw)


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(1 << 16):
        *whole, rest = (rest + chunk).split(b"\0")
        yield from whole
    yield rest
