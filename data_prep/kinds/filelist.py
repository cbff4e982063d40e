"""Kind `list`: a text file with one path or address a line, or NUL-separated (`find -print0`)."""

from collections.abc import Iterator

from data_prep.kinds.listing import (
    IMAGE_SUFFIXES,
    Listing,
    base_name,
    is_remote,
    joined,
    opened_file,
    parent_of,
    rows_of,
    source_at,
    suffix_of,
)
from data_prep.records import Source


def sources(path: str, listing: Listing) -> Iterator[Source]:
    """The files that a list names, in its order; what is missing is told as other."""
    base = listing.videos or parent_of(path)
    with opened_file(path) as file:
        for row, line in rows_of(file):
            source = source_at(
                name_of(line),
                joined(base, line),
                listing,
                f"{base_name(path)}, row {row}",
                kind="image" if suffix_of(line) in IMAGE_SUFFIXES else "video",
            )
            if source is not None:
                yield source


def name_of(line: str) -> str:
    """A source's name from the path or address that a table has for it."""
    return line.partition("://")[2] if is_remote(line) else line.lstrip("/")
