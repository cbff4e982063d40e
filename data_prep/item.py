"""One source, start to end: what a Ray task does, from the first look to the finished file.

Depends on the source and the settings alone, so it may run anywhere, again, or twice at the same
time, and leaves the same bytes. The process that runs it may die of a hostile video.
"""

import hashlib
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from av.error import FFmpegError
from pydantic import ValidationError
from webdataset.writer import TarWriter

from data_prep.album import Album, album_bytes
from data_prep.filters import unfit
from data_prep.kinds.material import Material, material
from data_prep.measure import Measured, measure
from data_prep.media import opened
from data_prep.records import ItemRecord, Rejection, SegmentRecord, Source
from data_prep.samples import Sample, sample_of
from data_prep.settings import PrepSettings
from data_prep.transcode import Segment, SegmentPlan, conforms, plan_segments, transcode
from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.confine import confined
from pipeline.data.decode import TimedFrame
from pipeline.errors import JepaError, StorageError
from pipeline.files import publish

RECORD_NAME = "record.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemJob:
    """A source to prepare. `refuse` says why it is not even looked at, if so."""

    source: Source
    item: str
    settings: PrepSettings
    result: str
    """Path of the finished file."""
    marker: str
    """Path of the file that is there while the work goes on."""
    refuse: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemDone:
    """What a worker tells of a source that it is done with."""

    record: ItemRecord
    seconds: float
    """How long the worker was at it."""


def prepare_item(job: ItemJob) -> ItemDone:
    """Checks, cuts, measures and transcodes a source and publishes what it gives.

    Raises:
        StorageError: The dataset's folder cannot be written.
    """
    begin = time.monotonic()
    there = read_record(Path(job.result))
    if there is not None:
        return ItemDone(record=there, seconds=time.monotonic() - begin)
    try:
        with _marked(Path(job.marker)):
            record = _published(job)
        return ItemDone(record=record, seconds=time.monotonic() - begin)
    except OSError as error:
        raise StorageError(
            f"{error.filename or job.result}: cannot be written: {error.strerror or error}",
            remedy="Free space or mend permissions, then run the same command to continue.",
        ) from error


def read_record(path: Path) -> ItemRecord | None:
    """The record in a finished file; None if there is no such file, or it is damaged."""
    try:
        with tarfile.open(path, "r:") as tar:
            file = tar.extractfile(RECORD_NAME)
            return None if file is None else ItemRecord.model_validate_json(file.read())
    except (OSError, KeyError, tarfile.TarError, ValidationError):
        return None


@contextmanager
def _marked(marker: Path) -> Iterator[None]:
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(str(os.getpid()))
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def _published(job: ItemJob) -> ItemRecord:
    result = Path(job.result)
    result.parent.mkdir(parents=True, exist_ok=True)
    partial = result.with_name(f"{job.item}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            # An integer time: a float costs a header of 1,024 bytes per member.
            writer = TarWriter(file, mtime=0, encoder=False)
            record = _Work(job, writer).record()
            text = record.model_dump_json().encode()
            writer.write({"__key__": "record", "json": text})
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        publish(partial, result)
    finally:
        partial.unlink(missing_ok=True)
    return record


class _Work:
    """What is found out and stored of one source."""

    def __init__(self, job: ItemJob, writer: TarWriter) -> None:
        self._source, self._settings, self._refuse = job.source, job.settings, job.refuse
        self._folder = Path(job.result).parent
        self._writer = writer
        self._segments: list[SegmentRecord] = []
        self._rejections: list[Rejection] = []
        self._found: Measured | None = None
        self._pictures: Sequence[TimedFrame] | None = None

    def record(self) -> ItemRecord:
        """Does the work; what is wrong with the source ends up in the record."""
        try:
            self._do()
        except BadMediaError as error:
            self._reject(error.reason, error.detail)
        info = self._found.info if self._found else None
        kept = len(self._segments)
        facts = (
            {
                "seconds": round(info.duration_seconds, 6),
                "codec": info.codec,
                "fps": round(info.fps, 4),
                "width": info.width,
                "height": info.height,
            }
            if info
            else {}
        )
        return ItemRecord(
            source=self._source.name,
            segments=tuple(self._segments),
            rejections=tuple(r.model_copy(update={"kept_samples": kept}) for r in self._rejections),
            **facts,
        )

    def _do(self) -> None:
        if self._refuse is not None:
            raise BadMediaError(BadReason.DECODER_KILLED, self._refuse)
        limits = self._settings.limits
        with opened(self._source, self._folder) as file:
            # Each pass has all of the time, which the decoder's own clock grants it as well.
            with confined(limits), _source_to_blame():
                made = material(self._source, file.content, self._settings)
            with confined(limits, held_bytes=album_bytes(self._settings)), _source_to_blame():
                album = Album(self._settings)
                self._found = measure(made.content, self._settings, album.see)
                self._pictures = album.pictures()
            with confined(limits):
                self._store(made, file.sha256, self._found)

    def _store(self, made: Material, sha256: str, found: Measured) -> None:
        with _source_to_blame():
            plan = self._planned(found)
        for segment in self._cut(made.content, found, plan) if plan.spans else ():
            sample = sample_of(self._source, sha256, segment, plan.partial)
            sample |= made.members(segment.start_seconds, segment.end_seconds)
            self._writer.write(sample)
            self._segments.append(_record_of(segment, sample, found))
        if found.info.partial is not None:
            self._reject(
                # The text begins with the reason: it broke, or the file ends too early.
                BadReason(found.info.partial.split(":")[0]),
                f"after {found.info.duration_seconds:.3f} s"
                f"{', which were kept' if self._segments else ''}: {plan.partial}",
            )

    def _planned(self, found: Measured) -> SegmentPlan:
        """Where the source is cut, without what is not wanted of it."""
        shots = found.shots_of(self._source, self._settings)
        for span in shots.too_short:
            least = self._settings.min_shot_seconds
            self._reject(
                BadReason.TOO_SHORT, f"a shot; at least {least:g} s are needed of one", span
            )
        plan = plan_segments(found.info, self._settings, shots.kept)
        wanted = tuple(span for span in plan.spans if self._is_fit(span, plan, found))
        return replace(plan, spans=wanted)

    def _is_fit(self, frames: tuple[int, int], plan: SegmentPlan, found: Measured) -> bool:
        """Judged before it is encoded, which is what costs most."""
        # A picture that is held still, or a robot that waits, is not a fault of the video.
        if self._source.kind != "video":
            return True
        start, end = (float(number / plan.fps) for number in frames)
        why = unfit(found.figures(start, end), self._settings)
        if why is not None:
            self._reject(why.reason, why.detail, (start, end), why.figures)
        return why is None

    def _cut(self, content: Path | bytes, found: Measured, plan: SegmentPlan) -> Iterator[Segment]:
        if self._settings.mode == "copy" and conforms(found.info, plan):
            yield Segment(
                number=0,
                start_seconds=0.0,
                end_seconds=found.info.duration_seconds,
                num_frames=found.info.num_frames,
                fps=found.info.fps,
                width=found.info.width,
                height=found.info.height,
                payload=content if isinstance(content, bytes) else content.read_bytes(),
            )
            return
        with _source_to_blame():
            yield from transcode(content, plan, self._settings, self._pictures)

    def _reject(
        self,
        reason: BadReason,
        detail: str,
        span: tuple[float, float] | None = None,
        figures: dict[str, float] | None = None,
    ) -> None:
        start, end = (round(seconds, 6) for seconds in span) if span else (None, None)
        self._rejections.append(
            Rejection(
                source=self._source.name,
                reason=str(reason),
                detail=detail,
                start_seconds=start,
                end_seconds=end,
                figures=figures,
            )
        )


@contextmanager
def _source_to_blame() -> Iterator[None]:
    """Makes a refusal of whatever else goes wrong: one of a million must not end the others.

    Nothing is written in here, so an error of the system comes from reading the source.
    """
    try:
        yield
    except (BadMediaError, MemoryError, JepaError):
        raise
    except FFmpegError as error:
        raise BadMediaError(BadReason.UNDECODABLE, _first_line(error)) from error
    except OSError as error:
        raise BadMediaError(BadReason.NOT_A_FILE, f"cannot be read: {error.strerror}") from error
    except Exception as error:
        text = f"{type(error).__name__}: {_first_line(error)}"
        raise BadMediaError(BadReason.UNDECODABLE, text) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _record_of(segment: Segment, sample: Sample, found: Measured) -> SegmentRecord:
    span = segment.start_seconds, segment.end_seconds
    return SegmentRecord(
        number=segment.number,
        key=str(sample["__key__"]),
        start_seconds=segment.start_seconds,
        end_seconds=segment.end_seconds,
        num_frames=segment.num_frames,
        fps=segment.fps,
        width=segment.width,
        height=segment.height,
        num_bytes=sum(len(content) for name, content in sample.items() if name != "__key__"),
        video_sha256=hashlib.sha256(segment.payload).hexdigest(),
        content_sha256=found.content_sha256(*span),
        figures=found.figures(*span),
    )
