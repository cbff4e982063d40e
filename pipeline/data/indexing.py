"""Writing the index: walks the headers of finished tars and says where every member lies.

A tar counts as finished only if it ends as a tar ends. `tarfile` takes a damaged header in the
middle for the end of the archive and says nothing, so a shard could lose samples silently.
"""

import hashlib
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from pydantic import JsonValue, ValidationError

from pipeline.data.layout import (
    CODECS,
    INDEX_DTYPE,
    INDEX_NAME,
    KEY_PATTERN,
    MANIFEST_NAME,
    MAX_MEMBER_BYTES,
    SHARD_PATTERN,
    SUFFIXES,
    Manifest,
    Member,
    MemberPlace,
    ShardEntry,
    Sidecar,
)
from pipeline.data.manifest import dataset_digest, file_sha256, manifest_text, write_durably
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.files import publish

_MEMBERS = {suffix: member for member, suffix in SUFFIXES.items()}
# TarFile keeps every header, about a kibibyte each.
_MAX_MEMBERS_PER_SHARD = 200_000
_BLOCK_BYTES = 512
_WRITE_AGAIN = "Remove this shard and run `jepa prep run` again with the same sources and settings."


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedShard:
    """What the index and the manifest need of one shard; its rows carry shard number 0."""

    entry: ShardEntry
    records: np.ndarray


def index_shard(path: Path) -> IndexedShard:
    """Walks one finished shard and checks all of it.

    Raises:
        DataError: It is no whole tar, or holds anything but samples of this format.
        StorageError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            rows = [_row(path, sample) for sample in _samples(path, file)]
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    entry = ShardEntry(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        num_samples=len(rows),
    )
    return IndexedShard(entry=entry, records=np.array(rows, dtype=INDEX_DTYPE))


def write_index(
    dataset_dir: Path,
    shards: Iterable[IndexedShard],
    preparation: Mapping[str, JsonValue] | None = None,
    *,
    captions: Literal["json", "text"] = "json",
    figures: Mapping[str, JsonValue] | None = None,
    before: Manifest | None = None,
) -> Manifest:
    """Writes index.npy and then manifest.json; the same shards give the same bytes.

    Args:
        dataset_dir: The dataset.
        shards: Its shards in order. Gone through twice, one in memory at a time, so rows that lie
            on disk may stay there.
        preparation: The settings that it was prepared with.
        captions: What its captions are.
        figures: Counts for the manifest.
        before: The manifest that is replaced; its samples' weights stay if the index does.

    Raises:
        StorageError: The file system refused.
    """
    counted = [(shard.entry, len(shard.records)) for shard in shards]
    entries = tuple(entry for entry, _ in counted)
    rows = _write_rows(dataset_dir / INDEX_NAME, shards, sum(count for _, count in counted))
    manifest = Manifest(
        digest=dataset_digest(rows.sha256, entries),
        index_sha256=rows.sha256,
        num_samples=rows.num,
        hours=round(rows.seconds / 3600, 6),
        members=tuple(str(member) for member in Member if rows.num and member in rows.members),
        shards=entries,
        weights_sha256=(
            before.weights_sha256 if before and before.index_sha256 == rows.sha256 else None
        ),
        preparation=dict(preparation or {}),
        figures=dict(figures or {}),
        captions=captions,
    )
    write_durably(dataset_dir / MANIFEST_NAME, manifest_text(manifest))
    return manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """What the manifest needs of the rows that were written."""

    num: int
    sha256: str
    seconds: float
    members: set[Member]


def _write_rows(path: Path, shards: Iterable[IndexedShard], num: int) -> _Rows:
    """Writes the index, a shard's rows at a time, in one step that survives a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    digest, written, seconds, members = hashlib.sha256(), 0, [0.0], set(Member)
    try:
        with partial.open("wb") as file:
            header = _header(num)
            digest.update(header)
            file.write(header)
            for number, shard in enumerate(shards):
                rows = shard.records.copy()
                rows["shard"] = number
                digest.update(rows.tobytes())
                file.write(rows.tobytes())
                written += len(rows)
                seconds.append(math.fsum(rows["duration_seconds"].tolist()))
                members -= {m for m in members if not (rows[str(m)]["length"] > 0).all()}
            file.flush()
            os.fsync(file.fileno())
        if written != num:
            raise StorageError(f"{path}: expected {num} rows, got {written}: a shard changed")
        publish(partial, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return _Rows(num=num, sha256=digest.hexdigest(), seconds=math.fsum(seconds), members=members)


def _header(num_rows: int) -> bytes:
    """How a `.npy` file of so many rows begins."""
    header = io.BytesIO()
    known = {
        "descr": np.lib.format.dtype_to_descr(INDEX_DTYPE),
        "fortran_order": False,
        "shape": (num_rows,),
    }
    np.lib.format.write_array_header_1_0(header, known)
    return header.getvalue()


def build_index(dataset_dir: Path, preparation: Mapping[str, JsonValue] | None = None) -> Manifest:
    """Indexes all shards that lie in a folder, in the order of their names.

    Raises:
        UsageError: There is no shard.
        DataError: A shard is damaged or holds something else.
    """
    paths = sorted(path for path in dataset_dir.glob("*.tar") if SHARD_PATTERN.fullmatch(path.name))
    if not paths:
        raise UsageError(f"{dataset_dir}: no shard (*.tar) in this folder")
    return write_index(dataset_dir, [index_shard(path) for path in paths], preparation)


def check_tar_end(path: Path, file: BinaryIO, end: int, remedy: str) -> None:
    """Makes sure that a tar ends at `end`: two blocks of zeros or more, and nothing after them.

    Raises:
        DataError: It goes on, or was cut off.
    """
    file.seek(end)
    rest = file.read(1 << 20)
    if len(rest) < 2 * _BLOCK_BYTES or rest.strip(b"\0") or file.read(1):
        raise DataError(
            f"{path}: damaged header or cut off at byte {end}: the archive does not end there",
            remedy=remedy,
        )


def _samples(path: Path, file: BinaryIO) -> Iterator[dict[Member, tuple[str, MemberPlace, bytes]]]:
    """The samples of a tar: members that follow one another and share a key."""
    key, sample = "", {}
    seen: set[str] = set()
    for name, member, place, payload in _members(path, file):
        member_key = name.removesuffix("." + SUFFIXES[member])
        if member_key != key:
            if sample:
                yield sample
            if member_key in seen:
                raise DataError(f"{path}: key {member_key!r} occurs twice", remedy=_WRITE_AGAIN)
            seen.add(member_key)
            key, sample = member_key, {}
        if member in sample:
            raise DataError(f"{path}: member {name!r} occurs twice", remedy=_WRITE_AGAIN)
        sample[member] = (member_key, place, payload)
    if sample:
        yield sample


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, Member, MemberPlace, bytes]]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for count, info in enumerate(tar):
                if count >= _MAX_MEMBERS_PER_SHARD:
                    raise DataError(f"{path}: too many members", remedy=_WRITE_AGAIN)
                member = _checked_member(path, info)
                file.seek(info.offset_data)
                payload = file.read(info.size)
                if len(payload) != info.size:
                    raise DataError(f"{path}: ends inside {info.name!r}", remedy=_WRITE_AGAIN)
                place = MemberPlace(
                    offset=info.offset_data, length=info.size, crc32=zlib.crc32(payload)
                )
                yield info.name, member, place, payload
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a tar file: {error}", remedy=_WRITE_AGAIN) from error
    check_tar_end(path, file, end, _WRITE_AGAIN)


def _checked_member(path: Path, info: tarfile.TarInfo) -> Member:
    key, _, suffix = info.name.partition(".")
    member = _MEMBERS.get(suffix)
    if member is None or not KEY_PATTERN.fullmatch(key):
        raise DataError(f"{path}: unexpected member name {info.name!r}", remedy=_WRITE_AGAIN)
    if not info.isreg() or info.issparse():
        raise DataError(f"{path}: member {info.name!r} is no regular file", remedy=_WRITE_AGAIN)
    if not 0 < info.size <= MAX_MEMBER_BYTES[member]:
        raise DataError(
            f"{path}: member {info.name!r} has {info.size} bytes, "
            f"at most {MAX_MEMBER_BYTES[member]} are allowed",
            remedy=_WRITE_AGAIN,
        )
    return member


def _row(path: Path, sample: dict[Member, tuple[str, MemberPlace, bytes]]) -> tuple[object, ...]:
    key = next(iter(sample.values()))[0]
    for required in (Member.VIDEO, Member.SIDECAR):
        if required not in sample:
            raise DataError(
                f"{path}: sample {key!r} has no {SUFFIXES[required]}", remedy=_WRITE_AGAIN
            )
    sidecar = _sidecar(path, key, sample)
    places = (
        (place.offset, place.length, place.crc32)
        for place in (
            sample[member][1] if member in sample else MemberPlace(offset=0, length=0, crc32=0)
            for member in Member
        )
    )
    codec = CODECS.index(sidecar.codec) if sidecar.codec in CODECS else 0
    return (
        key.encode("ascii"),
        0,
        sidecar.num_frames,
        sidecar.duration_seconds,
        sidecar.fps,
        sidecar.width,
        sidecar.height,
        codec,
        *places,
    )


def _sidecar(path: Path, key: str, sample: dict[Member, tuple[str, MemberPlace, bytes]]) -> Sidecar:
    try:
        sidecar = Sidecar.model_validate_json(sample[Member.SIDECAR][2])
    except ValidationError as error:
        raise DataError(f"{path}: {key}.json: {error}", remedy=_WRITE_AGAIN) from error
    video = sample[Member.VIDEO][2]
    if sidecar.key != key or hashlib.sha256(video).hexdigest() != sidecar.video_sha256:
        raise DataError(
            f"{path}: {key}.json describes another video than {key}.mp4", remedy=_WRITE_AGAIN
        )
    return sidecar
