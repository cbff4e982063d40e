"""What travels between the steps of a preparation: sources, what became of them, why not.

Everything here is plain data that survives JSON, since the ledger keeps it as text.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.section import Section
from pipeline.data.layout import Caption

SourceKind = Literal["video", "image", "episode"]
Labels = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One video, image or robot episode to prepare. `name` identifies it and gives its place."""

    name: str
    """Path below the folder that was given, or the row's or member's own name."""
    locator: str
    """Path of the file, or an fsspec URL, which is fetched when it is worked on."""
    num_bytes: int
    modified_ns: int
    kind: SourceKind = "video"
    member_offset: int | None = None
    """Where the video begins in the tar at `locator`, if it lies in one; `num_bytes` from there."""
    spans: tuple[tuple[float, float], ...] | None = None
    """Seconds from the first frame to keep; cut as usual where left out."""
    labels: Labels | None = None
    """Class labels and other facts, which go into every sidecar."""
    captions: tuple[Caption, ...] = ()
    """Texts with times in seconds from the source's first frame."""
    trajectory: str | None = None
    """File with times, states and actions, as its kind says."""

    @property
    def identity(self) -> str:
        """Digest of all that decides what it becomes; where it lies does not."""
        known = [self.name, self.num_bytes, self.modified_ns, self.kind, self.member_offset]
        known += [self.spans, self.labels, [c.model_dump() for c in self.captions]]
        known += [Path(self.trajectory).name if self.trajectory else None]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """All of it as text."""
        return json.dumps({**asdict(self), "captions": [c.model_dump() for c in self.captions]})

    @classmethod
    def from_json(cls, text: str) -> "Source":
        """What `to_json` wrote."""
        known = json.loads(text)
        spans = known["spans"]
        known["spans"] = None if spans is None else tuple((a, b) for a, b in spans)
        known["captions"] = tuple(Caption.model_validate(c) for c in known["captions"])
        return cls(**known)


def item_id(source: Source, settings_text: str) -> str:
    """Name of a source's finished work: a digest of the source and of how it is prepared.

    Args:
        source: What is prepared.
        settings_text: `digest_text` of the settings, which the caller asks for once.
    """
    text = f"{source.identity}\0{settings_text}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class SegmentFigures(Section):
    """What was measured of a segment's pictures, at most 8 of them a second."""

    motion: float
    """Mean change from picture to picture, in grey levels of 255 a second."""
    black_share: float
    """Share of pictures of which 98 % or more lies below a tenth of full brightness."""
    still_share: float
    """Share of pictures that differ from the one before by less than half a grey level."""
    hashes: tuple[str, ...]
    """Perceptual hashes of evenly spread pictures, 16 hexadecimal digits each."""


class SegmentRecord(Section):
    """One stored segment of a source."""

    number: int
    """Place among the segments that were stored of the source."""
    key: str
    """Its key in the shard."""
    start_seconds: float
    """Where it begins in the source."""
    end_seconds: float
    """Where it ends in the source."""
    num_frames: int
    """Frames stored."""
    fps: float
    """Frames a second stored."""
    width: int
    """Width stored, as shown."""
    height: int
    """Height stored, as shown."""
    num_bytes: int
    """Bytes of all its members."""
    video_sha256: str
    """Digest of the stored video."""
    content_sha256: str
    """Digest of the decoded frames: equal for sources that differ in their container alone."""
    figures: SegmentFigures
    """What its pictures are like."""


class Rejection(Section):
    """A source, or a part of it, that is not in the dataset; a line of rejected.jsonl."""

    source: str
    """Name of the source."""
    reason: str
    """Short reason that stays the same over releases."""
    detail: str
    """What exactly was expected and found."""
    kept_samples: int = 0
    """Samples made of the rest of it."""
    start_seconds: float | None = None
    """Where the part begins, if it is not the whole source."""
    end_seconds: float | None = None
    """Where the part ends."""
    figures: dict[str, float] | None = None
    """What was measured, if that was the reason."""


class ItemRecord(Section):
    """What became of one source."""

    source: str
    """Its name."""
    seconds: float = 0.0
    """Length that decodes."""
    codec: str = ""
    """Codec of the source."""
    fps: float = 0.0
    """Frames a second of the source."""
    width: int = 0
    """Width of the source, as shown."""
    height: int = 0
    """Height of the source, as shown."""
    segments: tuple[SegmentRecord, ...] = ()
    """What was stored of it."""
    rejections: tuple[Rejection, ...] = ()
    """What was not."""
