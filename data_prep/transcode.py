"""A video → H.264 segments that the loader decodes cheaply and without surprises.

Constant frame rate, presentation times from 0, no B-frames, no edit list, rotation applied,
8-bit 4:2:0 of limited range, even sizes, high dynamic range tone-mapped: variable rates, odd
pixel formats and turned pictures end here. The choice of encoder settings is measured:
`tune=fastdecode` alone makes decoding 2.2 times cheaper for 3 to 7 % more bytes.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from data_prep.painting import Painter, stored_size
from data_prep.settings import PrepSettings
from pipeline.data.decode import (
    BadMediaError,
    BadReason,
    MediaInfo,
    MediaReader,
    TimedFrame,
)

_TIME_TOLERANCE_SECONDS = 1e-6
# Longest GOP that still counts as conforming; above it a seek decodes too much.
_MAX_COPY_GOP_FRAMES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentPlan:
    """Where a source is cut: output frame k stands at k / fps."""

    fps: Fraction
    spans: tuple[tuple[int, int], ...]
    """First frame and the one after the last of every segment, ascending."""
    num_frames: int
    """Output frames of the whole source."""
    width: int
    height: int
    partial: str | None
    """Why the source does not decode to its end, if so; the cuts lie before that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One transcoded (or kept) part of a source, as the bytes of an MP4 file."""

    number: int
    start_seconds: float
    end_seconds: float
    num_frames: int
    fps: float
    width: int
    height: int
    payload: bytes


def plan_segments(
    info: MediaInfo, settings: PrepSettings, shots: Sequence[tuple[float, float]] | None = None
) -> SegmentPlan:
    """Decides rate, size and cuts of a source that was decoded once from end to end.

    Args:
        info: What it is.
        settings: How it is prepared.
        shots: Seconds from the first frame that are to be kept, ascending and apart; each is cut
            into equal parts if it is too long. All of the source where left out.

    Raises:
        BadMediaError: It is too short or too small.
    """
    if info.duration_seconds < settings.min_seconds - _TIME_TOLERANCE_SECONDS:
        raise BadMediaError(
            BadReason.TOO_SHORT,
            f"{info.duration_seconds:.3f} s decode, at least {settings.min_seconds:g} are needed"
            + (f" ({info.partial})" if info.partial else ""),
        )
    if min(info.width, info.height) < settings.min_side:
        raise BadMediaError(
            BadReason.TOO_SMALL,
            f"{info.width}×{info.height}, at least {settings.min_side} pixels are needed",
        )
    fps = stored_rate(settings, info.fps)
    num_frames = max(1, _frame_after(info.duration_seconds, fps))
    longest = max(1, math.floor(settings.max_seconds * fps))
    spans: list[tuple[int, int]] = []
    for begin, end in shots if shots is not None else ((0.0, math.inf),):
        last = num_frames if end >= info.duration_seconds else _frame_after(end, fps)
        spans += _parts(_frame_after(begin, fps), min(last, num_frames), longest)
    width, height = stored_size(info.width, info.height, settings.short_side)
    return SegmentPlan(
        fps=fps,
        spans=tuple(spans),
        num_frames=num_frames,
        width=width,
        height=height,
        partial=info.partial,
    )


def conforms(info: MediaInfo, plan: SegmentPlan) -> bool:
    """Whether a source already is what transcoding would make of it, so its bytes can stay."""
    return (
        (info.container, info.codec, info.pixel_format) == ("mov", "h264", "yuv420p")
        and (info.width, info.height) == (plan.width, plan.height)
        and (info.upright, info.has_b_frames, info.variable_rate) == (True, False, False)
        and (info.num_streams, info.first_pts_seconds, info.partial) == (1, 0.0, None)
        and info.max_gop_frames <= _MAX_COPY_GOP_FRAMES
        and abs(info.fps - plan.fps) < 0.01 * info.fps
        and plan.spans == ((0, plan.num_frames),)
    )


def stored_rate(settings: PrepSettings, native: float) -> Fraction:
    """Frames a second that are stored of a video with a rate of its own."""
    return Fraction(native if settings.fps == "native" else settings.fps).limit_denominator(1001)


def output_seconds(number: int, rate: Fraction) -> float:
    """Time up to which the frame that an output frame shows may be presented."""
    return float(number / rate) + _TIME_TOLERANCE_SECONDS


def transcode(
    video: Path | bytes,
    plan: SegmentPlan,
    settings: PrepSettings,
    pictures: Sequence[TimedFrame] | None = None,
) -> Iterator[Segment]:
    """The segments of a source, decoded in one pass and encoded by one thread each.

    Args:
        video: The source.
        plan: Where it is cut.
        settings: How it is prepared.
        pictures: What an `Album` kept of it; then nothing is decoded, and the bytes are the same.

    Raises:
        BadMediaError: It does not decode this time, or not in time.
    """
    if pictures is not None:
        shown = resampled(iter(pictures), plan)
        yield from _encoded(shown, plan, settings)
        return
    painter = Painter(plan.width, plan.height)
    with MediaReader(video, settings.limits) as reader:
        shown = resampled(reader.frames(), plan)
        yield from _encoded(shown, plan, settings, painter.paint)


def _encoded(
    shown: Iterator[VideoFrame],
    plan: SegmentPlan,
    settings: PrepSettings,
    paint: Callable[[VideoFrame], VideoFrame] = lambda picture: picture,
) -> Iterator[Segment]:
    reached = 0
    for number, (first, end) in enumerate(plan.spans):
        # What lies between two segments goes nowhere.
        next(itertools.islice(shown, first - reached, first - reached), None)
        reached = end
        encoder = _Encoder(plan, settings)
        for frame in itertools.islice(shown, end - first):
            encoder.add(paint(frame))
        if encoder.num_frames != end - first:
            raise BadMediaError(BadReason.UNDECODABLE, "fewer frames than a moment ago")
        yield Segment(
            number=number,
            start_seconds=float(first / plan.fps),
            end_seconds=float(end / plan.fps),
            num_frames=end - first,
            fps=float(plan.fps),
            width=plan.width,
            height=plan.height,
            payload=encoder.finish(),
        )


def _frame_after(seconds: float, fps: Fraction) -> int:
    """Number of the first output frame that is not before a time."""
    return math.ceil(seconds * fps - _TIME_TOLERANCE_SECONDS)


def _parts(first: int, end: int, longest: int) -> list[tuple[int, int]]:
    """Equal parts of at most so many frames; none of nothing."""
    num_frames, num_parts = end - first, math.ceil((end - first) / longest)
    borders = [first + n * num_frames // max(num_parts, 1) for n in range(num_parts + 1)]
    return list(itertools.pairwise(borders))


def resampled(frames: Iterator[TimedFrame], plan: SegmentPlan) -> Iterator[VideoFrame]:
    """At k / fps the last frame presented by then; without end, the last frame repeats."""
    decoded = _until_damage(frames) if plan.partial else frames
    current = next(decoded, None)
    if current is None:
        return
    upcoming = next(decoded, None)
    for number in itertools.count():
        seconds = output_seconds(number, plan.fps)
        while upcoming is not None and upcoming.seconds <= seconds:
            current, upcoming = upcoming, next(decoded, None)
        yield current.frame


def _until_damage(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
    """Ends where decoding failed before; the check has noted it."""
    try:
        yield from frames
    except BadMediaError as error:
        if error.reason is not BadReason.UNDECODABLE:
            raise


class _Encoder:
    """Encodes one segment; the same frames give the same bytes on any machine and load."""

    def __init__(self, plan: SegmentPlan, settings: PrepSettings) -> None:
        self._plan = plan
        self._settings = settings
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        self._stream: VideoStream | None = None
        self.num_frames = 0

    def add(self, picture: VideoFrame) -> None:
        """Appends a picture."""
        if self._stream is None:
            self._stream = self._open_stream(picture)
        picture.pts = self.num_frames
        picture.time_base = 1 / self._plan.fps
        # Left over from the source, it would force keyframes where the source had them.
        picture.pict_type = PictureType.NONE
        self._container.mux(self._stream.encode(picture))
        self.num_frames += 1

    def finish(self) -> bytes:
        """The finished file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()

    def _open_stream(self, picture: VideoFrame) -> VideoStream:
        options = {
            "crf": str(self._settings.crf),
            "preset": "veryfast",
            "tune": "fastdecode",
            "bf": "0",
            "g": str(self._settings.gop_frames),
            # x264's macroblock tree gives other bytes for the same frames now and then.
            "x264-params": "mbtree=0",
        }
        stream = self._container.add_stream("libx264", rate=self._plan.fps, options=options)
        context = stream.codec_context
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
        # More threads would change the bytes with the number of cores.
        context.thread_count = 1
        # Untagged, full-range and BT.709 sources would come back in other colours.
        context.color_range = picture.color_range
        context.colorspace = picture.colorspace
        return stream
