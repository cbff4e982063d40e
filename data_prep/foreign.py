"""An index for WebDataset tars of others, so that they train without being written again.

A sample is what consecutive members share before the first dot. Its video's frames are counted in
its packets, and its first frame is decoded; nothing is believed of the container's header. What a
sample has of the shard contract's other members is indexed too; a `.txt` is a caption of all of it.
"""

import hashlib
import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.error import FFmpegError

from data_prep.kinds.listing import VIDEO_SUFFIXES, printable
from data_prep.records import Rejection
from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.confine import DecodeLimits, confined
from pipeline.data.decode import probe_media
from pipeline.data.indexing import IndexedShard, check_tar_end, index_shard
from pipeline.data.layout import (
    CODECS,
    INDEX_DTYPE,
    KEY_PATTERN,
    MAX_MEMBER_BYTES,
    SUFFIXES,
    Member,
    MemberPlace,
    ShardEntry,
)
from pipeline.data.manifest import file_sha256
from pipeline.errors import DataError

MEND = "Fetch or write this tar again; the others need not be touched."
_VIDEOS = frozenset(suffix.removeprefix(".") for suffix in VIDEO_SUFFIXES)
_COMPANIONS = {
    SUFFIXES[member]: member
    for member in (Member.TIMES, Member.STATES, Member.ACTIONS, Member.CAPTIONS)
}
_TEXT = "txt"
_MAX_KEY_STEM = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignShard:
    """What indexing found in one tar."""

    indexed: IndexedShard
    rejections: tuple[Rejection, ...]
    captions: frozenset[str]
    """Forms of the captions in it: `json`, `text`."""
    ignored: dict[str, int]
    """Members that the loader has no use for, counted by suffix."""


@dataclass(kw_only=True, slots=True)
class _Sample:
    key: str
    name: str = ""
    video: bytes = b""
    places: dict[Member, MemberPlace] = field(default_factory=dict)
    captions: str = ""
    trouble: BadMediaError | None = None


def index_foreign_shard(
    path: Path,
    *,
    decode_everything: bool = False,
    deadly: frozenset[str] = frozenset(),
    note: Callable[[str], None] = lambda _key: None,
) -> ForeignShard:
    """Finds the samples of a tar and what each of them is. May die of a hostile video.

    Args:
        path: The tar.
        decode_everything: Decode every video to its end instead of its first frame alone.
        deadly: Samples that are not looked at, because a process died of them.
        note: Told the key of each sample before its video is looked at.

    Raises:
        DataError: It is no whole tar.
        StorageError: It cannot be read.
    """
    try:
        whole = index_shard(path)
    except DataError:
        pass
    else:
        return ForeignShard(indexed=whole, rejections=(), captions=frozenset({"json"}), ignored={})
    rows, rejections, forms, ignored = [], [], set(), Counter[str]()
    with path.open("rb") as file, confined(DecodeLimits()):
        for sample in _samples(path, file, ignored):
            note(sample.key)
            try:
                rows.append(_row(path, sample, decode_everything, deadly))
            except BadMediaError as error:
                rejections.append(
                    Rejection(
                        source=printable(f"{path.name}/{sample.key}"),
                        reason=str(error.reason),
                        detail=error.detail,
                    )
                )
            else:
                forms |= {sample.captions} - {""}
    entry = ShardEntry(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        num_samples=len(rows),
    )
    return ForeignShard(
        indexed=IndexedShard(entry=entry, records=np.array(rows, dtype=INDEX_DTYPE)),
        rejections=tuple(rejections),
        captions=frozenset(forms),
        ignored=dict(ignored),
    )


def _samples(path: Path, file: BinaryIO, ignored: Counter[str]) -> Iterator[_Sample]:
    sample = _Sample(key="")
    for info, payload_of in _members(path, file):
        folder, slash, base = info.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = f"{folder}{slash}{stem}"
        if key != sample.key:
            if sample.key:
                yield sample
            sample = _Sample(key=key)
        if not _take(sample, info, suffix.lower(), payload_of):
            ignored[suffix.lower()] += 1
    if sample.key:
        yield sample


def _take(
    sample: _Sample, info: tarfile.TarInfo, suffix: str, payload_of: Callable[[], bytes]
) -> bool:
    """Takes a member in; False if it is of no use."""
    member = _COMPANIONS.get(suffix)
    if suffix.rpartition(".")[2] in _VIDEOS:
        member = Member.VIDEO
    elif suffix == _TEXT and not sample.captions:
        member = Member.CAPTIONS
    if member is None or (member is Member.VIDEO and sample.video) or info.size == 0:
        return False
    if info.size > MAX_MEMBER_BYTES[member]:
        sample.trouble = BadMediaError(
            BadReason.TOO_MANY_BYTES,
            f"{info.name} has {info.size}, the limit is {MAX_MEMBER_BYTES[member]}",
        )
        return True
    payload = payload_of()
    if member is Member.VIDEO:
        sample.video, sample.name = payload, info.name
    if member is Member.CAPTIONS:
        sample.captions = "text" if suffix == _TEXT else "json"
    sample.places[member] = MemberPlace(
        offset=info.offset_data, length=info.size, crc32=zlib.crc32(payload)
    )
    return True


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                # TarFile would keep every header, a kibibyte each.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it is public
                if info.isreg() and not info.issparse():
                    yield info, lambda found=info: _payload(path, file, found)
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a plain tar file: {error}", remedy=MEND) from error
    check_tar_end(path, file, end, MEND)


def _payload(path: Path, file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    payload = file.read(info.size)
    if len(payload) != info.size:
        raise DataError(f"{path}: ends inside {info.name!r}", remedy=MEND)
    return payload


def _row(
    path: Path, sample: _Sample, decode_everything: bool, deadly: frozenset[str]
) -> tuple[object, ...]:
    if sample.trouble is not None:
        raise sample.trouble
    if sample.key in deadly:
        raise BadMediaError(BadReason.DECODER_KILLED, "while at this video")
    if not sample.video:
        raise BadMediaError(BadReason.MISSING_MEMBER, "no video in it")
    info = probe_media(sample.video, DecodeLimits(), decode_everything=decode_everything)
    if decode_everything:
        count, seconds, fps = info.num_frames, info.duration_seconds, info.fps
    else:
        count, seconds, fps = _by_packets(sample.video)
    nothing = MemberPlace(offset=0, length=0, crc32=0)
    places = (sample.places.get(member, nothing) for member in Member)
    return (
        index_key(path.name, sample.key).encode("ascii"),
        0,
        count,
        seconds,
        fps,
        info.width,
        info.height,
        CODECS.index(info.codec) if info.codec in CODECS else 0,
        *((place.offset, place.length, place.crc32) for place in places),
    )


def index_key(shard: str, key: str, *, unique: bool = False) -> str:
    """The name of a sample in the index: its own where it can be one.

    Args:
        shard: Name of the tar.
        key: Name of the sample there.
        unique: Add a digest of both, because another tar has the same key.
    """
    if KEY_PATTERN.fullmatch(key) and not unique:
        return key
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[-_MAX_KEY_STEM:].strip("_-") or "sample"
    digest = hashlib.sha256(f"{shard if unique else ''}\0{key}".encode("utf-8", "surrogateescape"))
    return f"{stem}-{digest.hexdigest()[:12]}"


def _by_packets(video: bytes) -> tuple[int, float, float]:
    """Frames, seconds and frames a second by the presentation times of the packets."""
    try:
        with av.open(
            io.BytesIO(video), "r", container_options={"protocol_whitelist": "none"}
        ) as container:
            stream = container.streams.best("video")
            ticks = [
                (packet.pts if packet.pts is not None else packet.dts, packet.time_base)
                for packet in container.demux(stream)
                if packet.size and not packet.is_discard
            ]
    except (FFmpegError, ValueError) as error:
        raise BadMediaError(BadReason.NOT_A_VIDEO, str(error).splitlines()[0][:200]) from error
    times = np.sort([float(tick * base) for tick, base in ticks if tick is not None])
    if len(times) == 0:
        raise BadMediaError(BadReason.UNDECODABLE, "no packet has a presentation time")
    if len(times) == 1:
        return 1, 0.0, 0.0
    steps = np.diff(times)
    step = max(float(np.median(steps)), 1e-6)
    return len(times), float(times[-1] - times[0]) + step, len(steps) / float(steps.sum() or step)
