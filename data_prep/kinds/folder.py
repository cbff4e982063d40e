"""Kind `folder`: all videos below a folder or address; captions may lie beside them.

`clip.captions.json` (the shard contract's list of captions) or `clip.txt` (one caption of the whole
video) belong to `clip.mp4`. Hidden files are left out; links to folders are followed, loops named.
"""

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_prep.kinds.listing import (
    VIDEO_SUFFIXES,
    Listing,
    about_everything,
    base_name,
    mistake,
    opened_file,
    printable,
    reached,
    remote_status,
    source_at,
    suffix_of,
)
from data_prep.records import Source
from pipeline.data.layout import Caption

_CAPTIONS_SUFFIX = ".captions.json"
_CAPTIONS = TypeAdapter(tuple[Caption, ...])
_MAX_CAPTIONS_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A file below a folder: its path from there, and all the names that lie beside it.

    `videos` has those of videos among them, without their suffixes.
    """

    relative: str
    path: str
    beside: frozenset[str]
    videos: frozenset[str]


def sources(root: str, listing: Listing) -> Iterator[Source]:
    """The videos below a local folder, folder by folder, each in the order of its names."""
    for found in files_below(root, listing):
        if suffix_of(found.path) in VIDEO_SUFFIXES:
            source = source_at(
                found.relative,
                found.path,
                listing,
                f"in {printable(root)}",
                captions=_captions_beside(found),
            )
            if source is not None:
                yield source
        elif not _is_companion(found):
            listing.on_other(printable(found.relative), "no video by its suffix")


def remote_sources(address: str, listing: Listing) -> Iterator[Source]:
    """The videos below an address, in the order of their names.

    The names of all objects are held in memory while they are listed.
    """
    with reached(address) as (filesystem, path):
        objects = filesystem.find(path, detail=True)
        base = path.rstrip("/")
        names_in: dict[str, list[str]] = {}
        for name in objects:
            folder, _, last = name.rpartition("/")
            names_in.setdefault(folder, []).append(last)
        folders = {folder: _beside(names) for folder, names in names_in.items()}
        for name in sorted(objects):
            beside, videos = folders[name.rpartition("/")[0]]
            found = Found(
                relative=name.removeprefix(base).lstrip("/") or base_name(name),
                path=filesystem.unstrip_protocol(name),
                beside=beside,
                videos=videos,
            )
            if suffix_of(name) in VIDEO_SUFFIXES:
                status = remote_status(objects[name])
                yield Source(
                    name=printable(found.relative),
                    locator=found.path,
                    num_bytes=status.num_bytes,
                    modified_ns=status.modified_ns,
                    captions=_captions_beside(found),
                )
            elif not _is_companion(found):
                listing.on_other(printable(found.relative), "no video by its suffix")


def files_below(root: str, listing: Listing) -> Iterator[Found]:
    """All files that are not hidden; unreadable folders and loops of links are told as others."""
    status = Path(root).stat()
    yield from _walk(root, "", frozenset({(status.st_dev, status.st_ino)}), listing)


def _walk(
    folder: str, relative: str, above: frozenset[tuple[int, int]], listing: Listing
) -> Iterator[Found]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        listing.on_other(printable(relative or folder), f"folder cannot be read: {error.strerror}")
        return
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    beside, videos = _beside([entry.name for entry in entries])
    for entry in entries:
        name = f"{relative}{entry.name}"
        if not _is_folder(entry):
            yield Found(relative=name, path=entry.path, beside=beside, videos=videos)
            continue
        try:
            status = entry.stat()
        except OSError as error:
            listing.on_other(printable(name), f"cannot be looked at: {error.strerror}")
            continue
        place = (status.st_dev, status.st_ino)
        if place in above:
            listing.on_other(printable(name), "a link to a folder above it")
        else:
            yield from _walk(entry.path, f"{name}/", above | {place}, listing)


def _beside(names: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    """All names of a folder, and those of its videos without their suffixes."""
    videos = (name for name in names if suffix_of(name) in VIDEO_SUFFIXES)
    return frozenset(names), frozenset(posixpath.splitext(name)[0] for name in videos)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _captions_beside(found: Found) -> tuple[Caption, ...]:
    stem = posixpath.splitext(base_name(found.path))[0]
    folder = os.path.dirname(found.path)  # noqa: PTH120 - keeps hostile names as they are
    if f"{stem}{_CAPTIONS_SUFFIX}" in found.beside:
        return captions_of(f"{folder}/{stem}{_CAPTIONS_SUFFIX}")
    if f"{stem}.txt" in found.beside:
        return about_everything(_text(f"{folder}/{stem}.txt"), "txt")
    return ()


def captions_of(locator: str) -> tuple[Caption, ...]:
    """The captions in a `.captions.json`.

    Raises:
        UsageError: It is no list of captions, or cannot be read.
    """
    with opened_file(locator) as file:
        content = file.read(_MAX_CAPTIONS_BYTES + 1)
    if len(content) > _MAX_CAPTIONS_BYTES:
        raise mistake(locator, None, f"at most {_MAX_CAPTIONS_BYTES} bytes", "more")
    try:
        return _CAPTIONS.validate_json(content)
    except ValidationError as error:
        raise mistake(
            locator, None, 'a list of {"t0": seconds, "t1": seconds, "text": …}', str(error)
        ) from error


def _text(path: str) -> str:
    with opened_file(path) as file:
        content = file.read(_MAX_CAPTIONS_BYTES)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise mistake(path, None, "UTF-8 text", content[:40]) from error


def _is_companion(found: Found) -> bool:
    name = base_name(found.path)
    return any(
        name.endswith(suffix) and name.removesuffix(suffix) in found.videos
        for suffix in (_CAPTIONS_SUFFIX, ".txt")
    )
