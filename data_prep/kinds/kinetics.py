"""Kind `kinetics`: lines of `path label`, or the official table of YouTube ids and seconds.

The official table has the columns youtube_id, time_start and time_end, and label and split where
known. Its videos may be trimmed (`<id>_000012_000022.mp4`) or whole (`<id>.mp4`, of which the
stated seconds are kept), in one folder or in a folder per label or per split.
"""

import csv
import io
from collections.abc import Iterator
from typing import IO

from data_prep.kinds.filelist import name_of
from data_prep.kinds.listing import (
    Listing,
    base_name,
    joined,
    mistake,
    opened_file,
    parent_of,
    rows_of,
    source_at,
    status_of,
)
from data_prep.records import Labels, Source

_OFFICIAL = ("youtube_id", "time_start", "time_end")
_SUFFIXES = (".mp4", ".mkv", ".webm")
_MAX_DIGITS = 18


def is_official(header: str) -> bool:
    """Whether a table's first line is that of the official tables."""
    names = {name.strip().strip('"') for name in header.split(",")}
    return names.issuperset(_OFFICIAL)


def is_path_label(line: str) -> bool:
    """Whether a line reads `path label` with a whole number as label."""
    return _is_class(_split(line)[2])


def _is_class(label: str) -> bool:
    """Whether a text is a class number; `isdigit` takes `²` for one, and 5000 digits."""
    return label.isascii() and label.isdecimal() and len(label) <= _MAX_DIGITS


def sources(path: str, listing: Listing) -> Iterator[Source]:
    """The videos that the table names, in its order; missing ones are told as others.

    Raises:
        UsageError: A row is not as documented.
    """
    with opened_file(path) as file:
        head = file.readline(1 << 16).decode("utf-8-sig", "replace")
    official = is_official(head)
    with opened_file(path) as file:
        yield from (_official if official else _path_labels)(file, path, listing)


def _path_labels(file: IO[bytes], path: str, listing: Listing) -> Iterator[Source]:
    base = listing.videos or parent_of(path)
    for row, line in rows_of(file):
        name, _, label = _split(line)
        if not name or not _is_class(label):
            raise mistake(path, row, "`path label`, the label a whole number", line)
        source = source_at(
            name_of(name),
            joined(base, name),
            listing,
            f"{base_name(path)}, row {row}",
            labels={"class": int(label)},
        )
        if source is not None:
            yield source


def _split(line: str) -> tuple[str, str, str]:
    separator = "::" if "::" in line else " "
    return line.strip().rpartition(separator)


def _official(file: IO[bytes], path: str, listing: Listing) -> Iterator[Source]:
    base = listing.videos or parent_of(path)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    for row, values in _csv_rows(path, text):
        video = (values.get("youtube_id") or "").strip()
        if not video or "/" in video:
            raise mistake(path, row, "an id in the column youtube_id", video)
        start, end = (_seconds(path, row, name, values) for name in _OFFICIAL[1:])
        if end <= start:
            raise mistake(path, row, "time_end after time_start", (start, end))
        labels: Labels = {n: str(values[n]) for n in ("label", "split") if values.get(n)}
        yield from _where(
            video, (start, end), labels, base, listing, f"{base_name(path)}, row {row}"
        )


def _csv_rows(path: str, text: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(text)
    try:
        for values in reader:
            yield reader.line_num, values
    except (csv.Error, UnicodeDecodeError) as error:
        raise mistake(path, reader.line_num + 1, "a row of CSV in UTF-8", str(error)) from error


def _where(
    video: str, span: tuple[float, float], labels: Labels, base: str, listing: Listing, why: str
) -> Iterator[Source]:
    trimmed = f"{video}_{int(span[0]):06d}_{int(span[1]):06d}"
    folders = ["", *(f"{labels[name]}/" for name in ("label", "split") if name in labels)]
    for stem, spans in ((trimmed, None), (video, (span,))):
        for folder in folders:
            for suffix in _SUFFIXES:
                relative = f"{folder}{stem}{suffix}"
                if status_of(joined(base, relative)) is None:
                    continue
                # Several rows may be parts of one whole video.
                name = relative if spans is None else f"{folder}{trimmed}{suffix}"
                source = source_at(
                    name, joined(base, relative), listing, why, labels=labels or None, spans=spans
                )
                if source is not None:
                    yield source
                return
    listing.on_other(trimmed, f"{why}: no {trimmed}.mp4 and no {video}.mp4 in {base}")


def _seconds(path: str, row: int, name: str, values: dict[str, str]) -> float:
    try:
        seconds = float(values[name])
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise mistake(path, row, f"seconds in the column {name}", values[name])
    return seconds
