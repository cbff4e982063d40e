"""Which videos there are, in which order, and which of them share a shard.

Everything after depends only on this list: a video's shard, name and place follow from the sorted
names and the sizes, never from which worker was free.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.settings import PrepSettings
from pipeline.errors import UsageError

VIDEO_SUFFIXES = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts"),
        *(".flv", ".3gp", ".gif", ".ogv", ".wmv", ".asf", ".vob", ".mts"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One video to prepare. `name` identifies it: its path below the folder that was given."""

    name: str
    path: str
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceList:
    """What was found; `num_ignored` counts files that have no video's suffix."""

    sources: tuple[Source, ...]
    num_ignored: int


def list_sources(roots: Sequence[Path]) -> SourceList:
    """Finds the videos below some folders, in the order of their names.

    A file that is named itself is taken whatever its suffix; hidden files are left out.

    Raises:
        UsageError: A path does not exist, two videos have the same name, or there is none.
    """
    found: dict[str, Source] = {}
    num_ignored = 0
    for root in roots:
        if not root.exists():
            raise UsageError(f"{root}: no such file or folder", remedy="Correct the source path.")
        prefix = f"{root.resolve().name}/" if len(roots) > 1 and root.is_dir() else ""
        for path in _files_below(root):
            if path != root and path.suffix.lower() not in VIDEO_SUFFIXES:
                num_ignored += 1
                continue
            relative = path.name if path == root else path.relative_to(root).as_posix()
            source = _source(prefix + relative, path)
            if source.name in found:
                raise UsageError(
                    f"two sources would both be called {source.name!r}: "
                    f"{found[source.name].path} and {path}",
                    remedy="Give their common parent folder as the source instead.",
                )
            found[source.name] = source
    if not found:
        raise UsageError(
            f"no video found in {', '.join(map(str, roots)) or 'nothing'} "
            f"({num_ignored} other files; suffixes looked for: {' '.join(sorted(VIDEO_SUFFIXES))})",
            remedy="Name folders with videos, or the video files themselves.",
        )
    ordered = tuple(found[name] for name in sorted(found, key=str.encode))
    return SourceList(sources=ordered, num_ignored=num_ignored)


def partition(sources: Sequence[Source], settings: PrepSettings) -> tuple[tuple[Source, ...], ...]:
    """Cuts the list into consecutive parts, each of which becomes one shard."""
    parts: list[tuple[Source, ...]] = []
    part: list[Source] = []
    num_bytes = 0
    limit = settings.shard_mib * 2**20
    for source in sources:
        full = len(part) == settings.videos_per_shard or num_bytes + source.num_bytes > limit
        if part and full:
            parts.append(tuple(part))
            part, num_bytes = [], 0
        part.append(source)
        num_bytes += source.num_bytes
    return (*parts, tuple(part)) if part else tuple(parts)


def inputs_digest(sources: Sequence[Source], settings: PrepSettings) -> str:
    """Identity of some sources and how they are prepared; a touched file counts as another."""
    digest = hashlib.sha256(settings.digest_text().encode())
    for source in sources:
        digest.update(f"\0{source.name}\0{source.num_bytes}\0{source.modified_ns}".encode())
    return digest.hexdigest()


def _files_below(root: Path) -> list[Path]:
    if not root.is_dir():
        return [root]
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    return files


def _source(name: str, path: Path) -> Source:
    status = path.stat()
    # File names are bytes; what is no UTF-8 is written as \xNN so that JSON can hold it.
    printable = os.fsencode(name).decode("utf-8", "backslashreplace")
    return Source(
        name=printable,
        path=str(path),
        num_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
    )
