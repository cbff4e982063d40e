"""One part of the sources → one shard: what a Ray task does, from the first video to the record.

Depends on the part's sources and the settings alone, so it may run anywhere, again, or twice at
the same time, and leaves the same bytes.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from data_prep.ledger import Ledger, PartRecord, Rejection
from data_prep.settings import PrepSettings
from data_prep.sources import Source, inputs_digest
from data_prep.transcode import Segment, SegmentPlan, conforms, plan_segments, transcode
from pipeline.data.decode import BadMediaError, BadReason, MediaInfo, probe_media
from pipeline.data.format import Sidecar
from pipeline.data.indexing import index_shard
from pipeline.data.layout import INDEX_DTYPE
from pipeline.data.manifest import file_sha256
from pipeline.errors import StorageError
from pipeline.files import publish


@dataclass(frozen=True, kw_only=True, slots=True)
class PartJob:
    """A part to prepare. `deadly` names sources that killed their worker and are left out."""

    number: int
    sources: tuple[Source, ...]
    settings: PrepSettings
    dataset_dir: str
    deadly: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class PartReport:
    """What a finished part became."""

    number: int
    record: PartRecord


def prepare_part(job: PartJob) -> PartReport:
    """Checks, cuts and transcodes the sources of a part and publishes their shard.

    Raises:
        StorageError: The dataset's folder cannot be written.
    """
    ledger = Ledger(Path(job.dataset_dir))
    partial = ledger.partial_path(job.number)
    try:
        report = _write_part(job, ledger, partial)
    except OSError as error:
        raise StorageError(
            f"{error.filename or job.dataset_dir}: cannot be written: {error.strerror}",
            remedy="Free space or mend permissions, then run the same command to continue.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return report


def _write_part(job: PartJob, ledger: Ledger, partial: Path) -> PartReport:
    outcomes: list[_Outcome] = []
    with partial.open("wb") as file:
        # An integer time: a float costs a header of 1,024 bytes per member.
        writer = TarWriter(file, mtime=0, encoder=False)
        for source in job.sources:
            ledger.marker_path(job.number).write_text(source.name)
            outcomes.append(_write_samples(writer, source, job))
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    entry, rows = None, np.empty(0, dtype=INDEX_DTYPE)
    if any(outcome.num_samples for outcome in outcomes):
        indexed = index_shard(partial)
        shard = ledger.shard_path(job.number)
        entry, rows = indexed.entry.model_copy(update={"name": shard.name}), indexed.records
        publish(partial, shard)
    record = PartRecord(
        inputs=inputs_digest(job.sources, job.settings),
        shard=entry,
        num_sources=len(job.sources),
        rejections=tuple(outcome.rejection for outcome in outcomes if outcome.rejection),
    )
    ledger.write(job.number, record, rows)
    return PartReport(number=job.number, record=record)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    num_samples: int
    rejection: Rejection | None


def _write_samples(writer: TarWriter, source: Source, job: PartJob) -> _Outcome:
    """Writes the samples of one source; what is wrong with it ends up in the outcome."""
    num_samples = 0
    trouble: BadMediaError | None = None
    path = Path(source.path)
    try:
        info = _checked(path, source, job)
        plan = plan_segments(info, job.settings)
        source_sha256 = _digest(path)
        for segment in _segments(path, info, plan, job.settings):
            writer.write(_sample(source, source_sha256, segment, plan))
            num_samples += 1
        if info.partial is not None:
            trouble = BadMediaError(
                BadReason.UNDECODABLE,
                f"after {info.duration_seconds:.3f} s, which were kept: {info.partial}",
            )
    except BadMediaError as error:
        trouble = error
    rejection = trouble and Rejection(
        source=source.name,
        reason=trouble.reason,
        detail=trouble.detail,
        kept_samples=num_samples,
    )
    return _Outcome(num_samples=num_samples, rejection=rejection)


def _checked(path: Path, source: Source, job: PartJob) -> MediaInfo:
    if source.name in job.deadly:
        raise BadMediaError(BadReason.DECODER_KILLED, "twice, while at this video")
    return probe_media(path, job.settings.limits, decode_everything=True)


def _segments(
    path: Path, info: MediaInfo, plan: SegmentPlan, settings: PrepSettings
) -> Iterator[Segment]:
    if settings.mode == "copy" and conforms(info, plan):
        yield Segment(
            number=0,
            start_seconds=0.0,
            end_seconds=info.duration_seconds,
            num_frames=info.num_frames,
            fps=info.fps,
            width=info.width,
            height=info.height,
            payload=path.read_bytes(),
        )
        return
    yield from transcode(path, plan, settings)


def _sample(
    source: Source, source_sha256: str, segment: Segment, plan: SegmentPlan
) -> dict[str, str | bytes]:
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
        partial=plan.partial,
    )
    text = sidecar.model_dump_json(exclude_none=True)
    return {"__key__": key, "json": text.encode(), "mp4": segment.payload}


def sample_key(source_name: str, segment: int) -> str:
    """A key that shows where a sample comes from and is unique, whatever the file is called."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source_name).stem)[:36].strip("_-")
    digest = hashlib.sha256(source_name.encode()).hexdigest()[:12]
    return f"{stem or 'video'}-{digest}-{segment:04d}"


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except StorageError as error:
        raise BadMediaError(BadReason.NOT_A_FILE, str(error)) from error
