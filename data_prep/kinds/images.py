"""Kind `images`: a folder of pictures, one folder per class, as ImageNet is laid out.

Each picture becomes a short clip of one repeated frame. Its label `class` is the first folder on
the way to it.
"""

from collections.abc import Iterator

from data_prep.kinds.folder import files_below
from data_prep.kinds.listing import IMAGE_SUFFIXES, Listing, printable, source_at, suffix_of
from data_prep.records import Source


def sources(root: str, listing: Listing) -> Iterator[Source]:
    """The pictures below a folder, in the order of their names."""
    for found in files_below(root, listing):
        if suffix_of(found.path) not in IMAGE_SUFFIXES:
            listing.on_other(printable(found.relative), "no picture by its suffix")
            continue
        folder, _, rest = found.relative.partition("/")
        labels = {"class": printable(folder)} if rest else None
        source = source_at(
            found.relative,
            found.path,
            listing,
            f"in {printable(root)}",
            kind="image",
            labels=labels,
        )
        if source is not None:
            yield source
