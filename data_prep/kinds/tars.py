"""Kind `tars`: WebDataset shards of others: a tar, a folder of them, or `{000..127}.tar`.

Members that follow one another and share the part of their names before the first dot are one
sample. Its video or picture is read from where it lies in the tar; `.txt` becomes a caption, `.cls`
the label `class`, what is plain in `.json` labels (its `caption` or `text` a caption), and
`.captions.json` captions. A sample of ours brings the labels of its sidecar along.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_prep.kinds.listing import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Listing,
    Status,
    about_everything,
    base_name,
    opened_file,
    plain_labels,
    printable,
    status_of,
)
from data_prep.records import Labels, Source
from pipeline.data.layout import Caption
from pipeline.errors import UsageError

_TEXT_SUFFIXES = frozenset({"txt", "json", "cls", "captions.json"})
_MAX_TEXT_BYTES = 1 << 20
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_TARS = 1_000_000
_CAPTIONS = TypeAdapter(tuple[Caption, ...])


@dataclass(kw_only=True, slots=True)
class _Sample:
    key: str
    video: tuple[str, int, int] | None = None
    """Name, offset and size of the member with the pictures."""
    texts: dict[str, bytes] = field(default_factory=dict)


def shards_of(path: str) -> list[str]:
    """The tars that an argument stands for, in order.

    Raises:
        UsageError: There is none, or the braces stand for too many.
    """
    if _BRACES.search(path):
        return list(_expanded(path))
    if not Path(path).is_dir():
        return [path]
    found = sorted(str(one) for one in Path(path).glob("*.tar"))
    if not found:
        raise UsageError(f"{path}: no *.tar in this folder", remedy="Correct the source's path.")
    return found


def sources(path: str, listing: Listing) -> Iterator[Source]:
    """The samples of the tars, in the order of the tars; what has no video is told as other."""
    for shard in shards_of(path):
        status = status_of(shard)
        if status is None:
            listing.on_other(printable(base_name(shard)), "no such file")
            continue
        for sample in _samples(shard, listing):
            if sample.video is None:
                listing.on_other(f"{base_name(shard)}/{sample.key}", "no video or picture in it")
            else:
                yield _source(shard, status, sample, listing)


def _source(shard: str, status: Status, sample: _Sample, listing: Listing) -> Source:
    name, offset, num_bytes = sample.video or ("", 0, 0)
    place = printable(f"{base_name(shard).removesuffix('.tar')}/{name}")
    labels, captions = _facts(sample, place, listing)
    return Source(
        name=place,
        locator=shard,
        num_bytes=num_bytes,
        modified_ns=status.modified_ns,
        kind="image" if f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES else "video",
        member_offset=offset,
        labels=labels or None,
        captions=captions,
    )


def _samples(shard: str, listing: Listing) -> Iterator[_Sample]:
    sample = _Sample(key="")
    with opened_file(shard) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is closed here
        except tarfile.ReadError as error:
            reason = f"not a plain tar file: {error} (compressed ones have to be unpacked first)"
            listing.on_other(printable(base_name(shard)), reason)
            return
        for info in _members(tar, shard, listing):
            folder, _, base = info.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != sample.key:
                if sample.key:
                    yield sample
                sample = _Sample(key=key)
            _take(sample, suffix.lower(), info, tar)
    if sample.key:
        yield sample


def _take(sample: _Sample, suffix: str, info: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    last = f".{suffix.rpartition('.')[2]}"
    if last in VIDEO_SUFFIXES or last in IMAGE_SUFFIXES:
        # A picture beside a video is its thumbnail.
        is_better = sample.video is None or (
            last in VIDEO_SUFFIXES
            and f".{sample.video[0].rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
        )
        if is_better:
            sample.video = (info.name, info.offset_data, info.size)
    elif suffix in _TEXT_SUFFIXES and info.size <= _MAX_TEXT_BYTES:
        file = tar.extractfile(info)
        sample.texts[suffix] = file.read() if file else b""


def _members(tar: tarfile.TarFile, shard: str, listing: Listing) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar; where it is damaged, that is told and the rest is lost."""
    name = printable(base_name(shard))
    while True:
        try:
            info = tar.next()
        except tarfile.TarError as error:
            listing.on_other(name, f"damaged at byte {tar.offset}: {error}")
            return
        if info is None:
            break
        # TarFile would keep every header, a kibibyte each.
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it is public
        if info.isreg() and not info.issparse():
            yield info
    file = tar.fileobj
    end = tar.offset
    if file is not None:
        file.seek(end)
        if file.read(512).strip(b"\0"):
            listing.on_other(name, f"damaged header or cut off at byte {end}: the rest is lost")


def _facts(sample: _Sample, place: str, listing: Listing) -> tuple[Labels, tuple[Caption, ...]]:
    labels: Labels = {}
    captions: tuple[Caption, ...] = ()
    try:
        if "json" in sample.texts:
            known = json.loads(sample.texts["json"])
            labels, text = _plain(known) if isinstance(known, dict) else ({}, "")
            captions = about_everything(text, "json")
        if "cls" in sample.texts:
            word = sample.texts["cls"].decode().strip()
            labels["class"] = int(word) if word.isdecimal() and len(word) < 18 else word
        if "txt" in sample.texts:
            captions = about_everything(sample.texts["txt"].decode(), "txt")
        if "captions.json" in sample.texts:
            captions = _CAPTIONS.validate_json(sample.texts["captions.json"])
    except (ValueError, ValidationError, RecursionError) as error:
        listing.on_other(place, f"its labels and captions are left out: {str(error)[:200]}")
    return labels, captions


def _plain(known: dict[str, Any]) -> tuple[Labels, str]:
    if "video_sha256" in known and "schema_version" in known:
        return plain_labels(known.get("labels")), ""
    text = next((known[name] for name in ("caption", "text") if known.get(name)), "")
    labels = plain_labels({n: known[n] for n in known if n not in ("caption", "text")})
    return labels, text if isinstance(text, str) else ""


def _expanded(path: str) -> Iterator[str]:
    found = _BRACES.search(path)
    if found is None:
        yield path
        return
    first, last = (int(number) for number in found.groups())
    if not 0 <= last - first < _MAX_TARS:
        raise UsageError(f"{path}: braces from {first} to {last}", remedy="Write {first..last}.")
    width = len(found.group(1))
    for number in range(first, last + 1):
        yield from _expanded(f"{path[: found.start()]}{number:0{width}d}{path[found.end() :]}")
