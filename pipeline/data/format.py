"""Reading a dataset folder: any sample by its number, one `pread` per member.

The layout is `layout.py`'s. Nothing read here is trusted: sizes and offsets are checked against
the files, arrays are parsed without pickle and every member against the checksum in the index.
"""

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.inspection import ShardDamage, inspect_shards
from pipeline.data.layout import (
    ARRAY_KINDS,
    CODECS,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    SUFFIXES,
    Caption,
    IndexRecord,
    Manifest,
    Member,
    MemberPlace,
    Sidecar,
)
from pipeline.data.manifest import PREPARE_AGAIN, file_sha256, read_manifest
from pipeline.data.rawfile import (
    Descriptor,
    check_places,
    map_records,
    parse_array,
)
from pipeline.data.weights import WeightTable, open_weights
from pipeline.errors import DataError, StorageError

__all__ = [
    "INDEX_DTYPE",
    "SCHEMA_VERSION",
    "BadMediaError",
    "BadReason",
    "Caption",
    "IndexRecord",
    "Manifest",
    "Member",
    "MemberPlace",
    "ShardIndex",
    "Sidecar",
    "read_manifest",
]

_MAX_OPEN_SHARDS = 128
_MAX_SHARDS_SHOWN = 20
_CAPTIONS = TypeAdapter(tuple[Caption, ...])
_Parsed = TypeVar("_Parsed")


class ShardIndex:
    """A prepared dataset, opened for reading samples by number.

    Holds the memory-mapped index and a bounded number of open shards; both are per process, and
    pickling or forking an index is cheap: it carries the folder's name and what is damaged only.

    Attributes:
        damaged: Shards that were found damaged when the dataset was opened, by number.
        weights: What samples are drawn in proportion to, if the manifest lists weights.
    """

    def __init__(self, *, path: Path, manifest: Manifest, records: np.ndarray) -> None:
        self.path = path
        self.manifest = manifest
        self.records = records
        self.damaged: dict[int, ShardDamage] = {}
        self.weights: WeightTable | None = None
        self._open_shards: OrderedDict[int, Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        dataset_dir: Path | str,
        *,
        verify: bool = True,
        on_damaged_shard: Literal["stop", "quarantine"] = "stop",
    ) -> Self:
        """Opens the dataset in `dataset_dir`.

        Args:
            dataset_dir: The folder that `jepa prep run` wrote.
            verify: Compare the index with its digest and the shards with their sizes. Leave it
                out only where this process's parent has done it.
            on_damaged_shard: Refuse a dataset with a shard that is missing or of another size, or
                open it all the same: then what is gone of it is a bad sample when it is read.

        Raises:
            UsageError: There is no finished dataset, or it has another schema version.
            DataError: A file is missing, has another size or digest, or is malformed.
        """
        path = Path(dataset_dir)
        manifest = read_manifest(path)
        index_path = path / INDEX_NAME
        if verify and file_sha256(index_path) != manifest.index_sha256:
            raise DataError(
                f"{index_path}: its SHA-256 differs from the one in {MANIFEST_NAME}",
                remedy=PREPARE_AGAIN,
            )
        index = cls(path=path, manifest=manifest, records=map_records(index_path))
        index._check_count()
        if verify and manifest.weights_sha256 is not None:
            index.weights = open_weights(path, len(index), manifest.weights_sha256)
        if verify:
            check_places(index.records, manifest.shards, manifest.members, index_path)
            index.damaged = inspect_shards(path, manifest.shards, index.records, everything=False)
            if index.damaged and on_damaged_shard == "stop":
                raise damage_error(path, index.damaged)
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (type(self), str(self.path), self.damaged, self.weights))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def digest(self) -> str:
        """Identity of the dataset: changes with any byte of any shard or of the index."""
        return self.manifest.digest

    def record(self, sample: int) -> IndexRecord:
        """The index row of sample number `sample`, 0 ≤ sample < len(self)."""
        if not 0 <= sample < len(self.records):
            raise IndexError(f"sample {sample} of a dataset with {len(self.records)}")
        row = self.records[sample]
        codec = int(row["codec"])
        return IndexRecord(
            key=row["key"].decode("ascii"),
            shard=int(row["shard"]),
            num_frames=int(row["num_frames"]),
            duration_seconds=float(row["duration_seconds"]),
            fps=float(row["fps"]),
            width=int(row["width"]),
            height=int(row["height"]),
            codec=CODECS[codec] if codec < len(CODECS) else CODECS[0],
            places=tuple(MemberPlace(**_place(row[str(member)])) for member in Member),
        )

    def shard_path(self, record: IndexRecord) -> Path:
        """The tar file that holds the sample of `record`."""
        return self.path / self.manifest.shards[record.shard].name

    def read_member(self, record: IndexRecord, member: Member = Member.VIDEO) -> bytes:
        """The bytes of one member of a sample, checked against the index's checksum.

        Raises:
            BadMediaError: The sample does not have it, or its bytes are damaged.
            StorageError: The shard cannot be read.
        """
        place = record.place(member)
        if place.length == 0:
            raise BadMediaError(BadReason.MISSING_MEMBER, f"{record.key}.{SUFFIXES[member]}")
        shard = self.shard_path(record)
        try:
            payload = self._descriptor(record.shard, shard).read(place.length, place.offset)
        except OSError as error:
            if record.shard in self.damaged:
                raise BadMediaError(
                    BadReason.DAMAGED, f"{record.key}: {self.damaged[record.shard]}"
                ) from error
            raise StorageError(f"{shard}: cannot be read: {error.strerror or error}") from error
        if len(payload) != place.length or zlib.crc32(payload) != place.crc32:
            raise BadMediaError(
                BadReason.DAMAGED,
                f"{record.key}.{SUFFIXES[member]} in {shard.name} at byte {place.offset}: "
                f"{len(payload)} of {place.length} bytes read, checksum differs",
            )
        return payload

    def read_sidecar(self, record: IndexRecord) -> Sidecar:
        """The parsed `KEY.json` of a sample; raises as `read_member`."""
        payload = self.read_member(record, Member.SIDECAR)
        return _parsed(Sidecar.model_validate_json, payload, f"{record.key}.json")

    def read_captions(self, record: IndexRecord) -> tuple[Caption, ...]:
        """The captions of a sample; raises as `read_member`."""
        payload = self.read_member(record, Member.CAPTIONS)
        if self.manifest.captions == "text":
            text = " ".join(payload.decode("utf-8", "replace").split())
            return (Caption(t0=0.0, t1=record.duration_seconds, text=text),)
        return _parsed(_CAPTIONS.validate_json, payload, f"{record.key}.captions.json")

    def read_array(self, record: IndexRecord, member: Member) -> np.ndarray:
        """`times` as float64 [T], `states` as float32 [T, S], `actions` as float32 [T − 1, A].

        Raises:
            BadMediaError: As `read_member`; or it is no array of that type, or not finite.
        """
        payload = self.read_member(record, member)
        dtype, num_dimensions = ARRAY_KINDS[member]
        try:
            array = parse_array(payload, dtype, num_dimensions)
        except ValueError as error:
            name = f"{record.key}.{SUFFIXES[member]}"
            raise BadMediaError(BadReason.DAMAGED, f"{name}: {error}") from error
        return array

    def close(self) -> None:
        """Closes the shards; reading opens them again."""
        with self._lock:
            self._open_shards.clear()

    def _descriptor(self, number: int, shard: Path) -> Descriptor:
        with self._lock:
            descriptor = self._open_shards.get(number)
            if descriptor is None:
                descriptor = self._open_shards[number] = Descriptor(shard)
            self._open_shards.move_to_end(number)
            if len(self._open_shards) > _MAX_OPEN_SHARDS:
                # Closed by its destructor, when the last thread that reads from it lets go.
                self._open_shards.popitem(last=False)
        return descriptor

    def _check_count(self) -> None:
        in_shards = sum(shard.num_samples for shard in self.manifest.shards)
        if {len(self.records), in_shards} != {self.manifest.num_samples}:
            raise DataError(
                f"{self.path}: {INDEX_NAME} has {len(self.records)} samples, {MANIFEST_NAME} "
                f"names {self.manifest.num_samples}",
                remedy=PREPARE_AGAIN,
            )


def damage_error(path: Path, damaged: dict[int, ShardDamage]) -> DataError:
    """The error that names damaged shards and the ways out."""
    lines = [f"  {damage}" for damage in damaged.values()]
    shown = [*lines[:_MAX_SHARDS_SHOWN], *(["  …"] if len(lines) > _MAX_SHARDS_SHOWN else [])]
    return DataError(
        "\n".join([f"{path}: {len(lines)} damaged shards:", *shown]),
        remedy=f"{PREPARE_AGAIN} `data.on_damaged_shard: quarantine` trains on what is left.",
    )


def _reopen(
    index_class: type[ShardIndex],
    path: str,
    damaged: dict[int, ShardDamage],
    weights: WeightTable | None,
) -> ShardIndex:
    index = index_class.open(path, verify=False)
    index.damaged, index.weights = damaged, weights
    return index


def _place(row: Any) -> dict[str, int]:
    return {
        "offset": int(row["offset"]),
        "length": int(row["length"]),
        "crc32": int(row["crc32"]),
    }


def _parsed(parse: Callable[[bytes], _Parsed], payload: bytes, name: str) -> _Parsed:
    try:
        return parse(payload)
    except ValidationError as error:
        raise BadMediaError(BadReason.DAMAGED, f"{name}: {error}") from error
