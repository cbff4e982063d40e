"""The shard contract: what lies in a dataset folder and what its files contain.

A dataset is a folder of plain WebDataset tars beside an index that says where every member of
every sample lies, so that any sample is one `pread` away:

    shard-000000.tar …   members KEY.json, KEY.mp4 and the optional ones of `SUFFIXES`
    index.npy            one fixed-width `INDEX_DTYPE` row per sample, memory-mapped
    manifest.json        sizes and digests of all of it (`Manifest`)
    rejected.jsonl       one line per source that was refused
    weights.npy          float32 sampling weights, one per sample, if the dataset is curated

Reading it is `format.py`'s work, writing the index `indexing.py`'s.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from pydantic import Field, JsonValue

from pipeline.config.section import Section

SCHEMA_VERSION = 1
INDEX_NAME = "index.npy"
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
WEIGHTS_NAME = "weights.npy"
MAX_KEY_BYTES = 64
SHARD_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,120}\.tar")
# No dot (WebDataset ends the key at the first one), no slash, no leading dash.
KEY_PATTERN = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_-]{{0,{MAX_KEY_BYTES - 1}}}")
CODECS = ("other", "h264", "hevc", "vp8", "vp9", "av1", "mpeg4")


class Member(StrEnum):
    """What a sample can consist of; the values are the index's column names."""

    VIDEO = "video"
    SIDECAR = "sidecar"
    TIMES = "times"
    STATES = "states"
    ACTIONS = "actions"
    CAPTIONS = "captions"


SUFFIXES: dict[Member, str] = {
    Member.VIDEO: "mp4",
    Member.SIDECAR: "json",
    Member.TIMES: "times.npy",
    Member.STATES: "states.npy",
    Member.ACTIONS: "actions.npy",
    Member.CAPTIONS: "captions.json",
}
# Readers take whole members into memory, so each kind has a ceiling.
MAX_MEMBER_BYTES: dict[Member, int] = {
    Member.VIDEO: 1 << 30,
    Member.SIDECAR: 1 << 20,
    Member.TIMES: 1 << 26,
    Member.STATES: 1 << 26,
    Member.ACTIONS: 1 << 26,
    Member.CAPTIONS: 1 << 22,
}
# dtype and number of dimensions
ARRAY_KINDS: dict[Member, tuple[np.dtype[Any], int]] = {
    Member.TIMES: (np.dtype("<f8"), 1),
    Member.STATES: (np.dtype("<f4"), 2),
    Member.ACTIONS: (np.dtype("<f4"), 2),
}

PLACE_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
INDEX_DTYPE = np.dtype(
    [
        ("key", f"S{MAX_KEY_BYTES}"),
        ("shard", "<u4"),
        ("num_frames", "<u4"),
        ("duration_seconds", "<f8"),
        ("fps", "<f4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("codec", "u1"),
        *((str(member), PLACE_DTYPE) for member in Member),
    ]
)
"""One row per sample; a member that is absent has length 0. Offsets are from the shard's start."""


class Sidecar(Section):
    """The content of `KEY.json`: where a sample comes from and what it is."""

    schema_version: Literal[1] = 1
    """Version of this layout."""
    key: str
    """The sample's name, as in the tar."""
    source: str
    """Path of the original video relative to the folder that was prepared."""
    source_sha256: str
    """SHA-256 of the original file."""
    segment_start_seconds: float
    """Where this segment begins in the original, from its first frame."""
    segment_end_seconds: float
    """Where this segment ends in the original, from its first frame."""
    num_frames: int
    """Frames that decode from the video member."""
    fps: float
    """Nominal frames per second of the video member."""
    duration_seconds: float
    """From the first frame's presentation to the end of the last frame's."""
    width: int
    """Width of the picture in pixels, as shown."""
    height: int
    """Height of the picture in pixels, as shown."""
    codec: str
    """Name of the video codec, such as `h264`."""
    video_bytes: int
    """Size of the video member."""
    video_sha256: str
    """SHA-256 of the video member."""
    partial: str | None = None
    """Why only the first part of the original could be decoded, if so."""
    labels: dict[str, str | int | float] | None = None
    """Class labels and other facts of the original, by name."""


class Caption(Section):
    """One element of the list in `KEY.captions.json`."""

    t0: float
    """Start of the described part in seconds from the first frame."""
    t1: float
    """End of the described part in seconds from the first frame."""
    text: str
    """What is to be seen; Unicode in normal form C."""
    source: str = ""
    """Who or what wrote the text."""
    lang: str = ""
    """Language of the text as a BCP 47 tag."""


class ShardEntry(Section):
    """One shard of a dataset, as the manifest lists it."""

    name: str
    """File name in the dataset folder."""
    bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of the file."""
    num_samples: int
    """Samples in the file."""


class Manifest(Section):
    """The content of `manifest.json`; written last, so a dataset without it is unfinished."""

    schema_version: Literal[1] = 1
    """Version of the dataset's layout."""
    digest: str
    """Identity of the dataset: SHA-256 over the index's and all shards' digests."""
    index_sha256: str
    """SHA-256 of index.npy."""
    num_samples: int
    """Samples in all shards."""
    hours: float
    """Duration of all samples together."""
    members: tuple[str, ...]
    """Members that every sample has."""
    shards: tuple[ShardEntry, ...]
    """The shards, in the order of the index's shard numbers."""
    weights_sha256: str | None = None
    """SHA-256 of weights.npy, if samples are to be drawn in proportion to it."""
    captions: Literal["json", "text"] = "json"
    """Whether captions members are lists with times, or plain texts about the whole sample."""
    preparation: dict[str, JsonValue] = Field(default_factory=dict)
    """The settings that the dataset was prepared with."""
    figures: dict[str, JsonValue] = Field(default_factory=dict)
    """Sources, codecs and histograms, as `data_prep/figures.py` counts them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberPlace:
    """Where the bytes of one member lie in its shard."""

    offset: int
    length: int
    crc32: int


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRecord:
    """One row of the index. `places` follows the order of `Member`."""

    key: str
    shard: int
    num_frames: int
    duration_seconds: float
    fps: float
    width: int
    height: int
    codec: str
    places: tuple[MemberPlace, ...]

    def place(self, member: Member) -> MemberPlace:
        """Where `member` lies; its length is 0 if the sample does not have it."""
        return self.places[_MEMBER_ORDER[member]]


_MEMBER_ORDER = {member: number for number, member in enumerate(Member)}
