"""Arguments of `jepa prep run` → sources of whatever kind: recognised, or named as `kind:PATH`."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from data_prep.kinds import droid, filelist, folder, images, kinetics, ssv2, table, tars
from data_prep.kinds.listing import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Listing,
    base_name,
    is_remote,
    opened_file,
    printable,
    source_at,
    suffix_of,
)
from data_prep.records import Source
from pipeline.errors import UsageError

Kind = Literal["file", "folder", "list", "table", "ssv2", "kinetics", "tars", "images", "droid"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# `s3://…` is an address, not a kind.
_NAMED = re.compile(rf"({'|'.join(KINDS)}):(?!//)(.+)", re.DOTALL)
_MAX_FILES_LOOKED_AT = 1000
_KIND_BY_SUFFIX: dict[str, Kind] = {".tar": "tars", ".parquet": "table", ".json": "ssv2"}
_WHAT: dict[Kind, str] = {
    "file": "one file",
    "folder": "a folder of videos",
    "list": "a list of files",
    "table": "a table of videos",
    "ssv2": "Something-Something V2",
    "kinetics": "a table as Kinetics has them",
    "tars": "WebDataset tars",
    "images": "a folder of pictures",
    "droid": "robot episodes as DROID has them",
}


def open_sources(
    arguments: Sequence[str],
    *,
    kind: Kind | None = None,
    videos: str | None = None,
    on_other: Callable[[str, str], None] = lambda _name, _reason: None,
    say: Callable[[str], None] = lambda _line: None,
) -> Iterator[Source]:
    """The sources that some arguments stand for, listed while they are asked for.

    Names do not depend on which other arguments there are, so that a source added later changes
    nothing of the earlier ones; two files of one name are for the caller to refuse.

    Args:
        arguments: Paths or addresses, each of which may begin with `kind:`.
        kind: What all arguments are that do not say it themselves; recognised if left out.
        videos: Folder or address that relative paths in tables start from.
        on_other: Told what was found and is no source, and why.
        say: Told what each argument was taken for.

    Raises:
        UsageError: There is no such path, or a table has a mistake.
    """
    listing = Listing(videos=videos, on_other=on_other)
    for argument in arguments:
        named = _NAMED.fullmatch(argument)
        path = named.group(2) if named else argument
        if not is_remote(path) and "{" not in path:
            _require_file(path)
        chosen = _kind_of(named.group(1)) if named else kind or recognised(path)
        say(f"{printable(path)}: {_WHAT[chosen]}{_details(chosen, path)} ({chosen})")
        yield from _READERS[chosen](path, listing)


def recognised(path: str) -> Kind:
    """What a path or address is, by its name and a look at what lies there.

    Raises:
        UsageError: There is nothing, or nothing that is known.
    """
    if "{" in path and path.endswith(".tar"):
        return "tars"
    if is_remote(path) or not Path(path).is_dir():
        return _recognised_file(path)
    return "ssv2" if ssv2.is_layout(path) else _recognised_folder(path)


def _recognised_folder(path: str) -> Kind:
    suffixes = set()
    for found in itertools.islice(folder.files_below(path, Listing()), _MAX_FILES_LOOKED_AT):
        if base_name(found.path) == droid.TRAJECTORY:
            return "droid"
        suffixes.add(suffix_of(found.path))
    if suffixes & VIDEO_SUFFIXES:
        return "folder"
    if suffixes & IMAGE_SUFFIXES:
        return "images"
    return "tars" if ".tar" in suffixes else "folder"


def _recognised_file(path: str) -> Kind:
    suffix = suffix_of(path)
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return "file"
    if is_remote(path) and not suffix:
        return "folder"
    if suffix in (".csv", ".txt", ".tsv", ".lst", ".list"):
        return _recognised_table(path, suffix)
    # Named by a person, so it is a video whatever it is called.
    return _KIND_BY_SUFFIX.get(suffix, "file")


def _recognised_table(path: str, suffix: str) -> Kind:
    with opened_file(path) as file:
        lines = [file.readline(1 << 16).decode("utf-8-sig", "replace").strip() for _ in range(2)]
    if kinetics.is_official(lines[0]):
        return "kinetics"
    if suffix == ".csv" and {name.strip().strip('"') for name in lines[0].split(",")} & {
        "path",
        "url",
    }:
        return "table"
    if kinetics.is_path_label(lines[0]):
        return "kinetics"
    return "list" if suffix != ".csv" else "table"


def _require_file(path: str) -> None:
    try:
        there = Path(path).exists()
    except (OSError, ValueError):
        there = False
    if not there:
        raise UsageError(
            f"{printable(path)[:300]}: no such file or folder",
            remedy=f"Correct the source's path, or its kind, which is one of {', '.join(KINDS)}.",
        )


def _file(path: str, listing: Listing) -> Iterator[Source]:
    image = suffix_of(path) in IMAGE_SUFFIXES
    name = base_name(path)
    source = source_at(name, path, listing, "named", kind="image" if image else "video")
    if source is None:
        raise UsageError(
            f"{printable(path)}: no such file", remedy="Correct the source's path or address."
        )
    yield source


def _folder(path: str, listing: Listing) -> Iterator[Source]:
    yield from (folder.remote_sources if is_remote(path) else folder.sources)(path, listing)


def _table(path: str, listing: Listing) -> Iterator[Source]:
    table.require_table(path)
    yield from table.sources(path, listing)


def _details(kind: Kind, path: str) -> str:
    if kind == "table":
        table.require_table(path)
        return f" with the columns {', '.join(table.columns_of(path))}"
    if kind == "tars":
        return f", {len(tars.shards_of(path))} of them"
    return ""


def _kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind == name)


_READERS: dict[Kind, Callable[[str, Listing], Iterator[Source]]] = {
    "file": _file,
    "folder": _folder,
    "list": filelist.sources,
    "table": _table,
    "ssv2": ssv2.sources,
    "kinetics": kinetics.sources,
    "tars": tars.sources,
    "images": images.sources,
    "droid": droid.sources,
}
