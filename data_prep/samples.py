"""What a segment is in a shard: its key, its sidecar, its captions."""

import hashlib
import json
import re
from pathlib import Path

from data_prep.records import Source
from data_prep.transcode import Segment
from pipeline.data.layout import Caption, Sidecar

Sample = dict[str, str | bytes]
"""A sample as webdataset writes it: contents by suffix, and `__key__`."""


def sample_of(source: Source, source_sha256: str, segment: Segment, partial: str | None) -> Sample:
    """The members of a segment that follow from its video and its source's own facts.

    Args:
        source: What it was cut from.
        source_sha256: Digest of the source's file.
        segment: The stored video.
        partial: Why the source does not decode to its end, if so.
    """
    key = sample_key(source.name, segment.number)
    sidecar = Sidecar(
        key=key,
        source=source.name,
        source_sha256=source_sha256,
        segment_start_seconds=segment.start_seconds,
        segment_end_seconds=segment.end_seconds,
        num_frames=segment.num_frames,
        fps=segment.fps,
        duration_seconds=segment.end_seconds - segment.start_seconds,
        width=segment.width,
        height=segment.height,
        codec="h264",
        video_bytes=len(segment.payload),
        video_sha256=hashlib.sha256(segment.payload).hexdigest(),
        partial=partial,
        labels=source.labels,
    )
    text = sidecar.model_dump_json(exclude_none=True)
    sample: Sample = {"__key__": key, "json": text.encode(), "mp4": segment.payload}
    if captions := _captions(source.captions, segment):
        content = [caption.model_dump() for caption in captions]
        sample["captions.json"] = json.dumps(content, ensure_ascii=False).encode()
    return sample


def sample_key(source_name: str, segment: int) -> str:
    """A key that shows where a sample comes from and is unique, whatever the file is called."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source_name).stem)[:36].strip("_-")
    digest = hashlib.sha256(source_name.encode()).hexdigest()[:12]
    return f"{stem or 'video'}-{digest}-{segment:04d}"


def _captions(captions: tuple[Caption, ...], segment: Segment) -> list[Caption]:
    """Those that speak of a segment, with their times from its own first frame."""
    begin, end = segment.start_seconds, segment.end_seconds
    return [
        caption.model_copy(
            update={
                "t0": round(max(caption.t0, begin) - begin, 6),
                "t1": round(min(caption.t1, end) - begin, 6),
            }
        )
        for caption in captions
        if caption.t0 < end and caption.t1 > begin
    ]
