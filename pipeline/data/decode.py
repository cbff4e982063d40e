"""Video bytes → the frames of a clip, chosen by presentation time alone."""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.confine import DecodeLimits
from pipeline.data.media import (
    MediaReader,
    TimedFrame,
    VideoFrame,
    VideoReformatter,
)
from pipeline.data.picture import is_upright, shown_size, to_rgb

__all__ = [
    "BadMediaError",
    "BadReason",
    "DecodeLimits",
    "DecodedFrames",
    "MediaInfo",
    "MediaReader",
    "PicturePart",
    "TimedFrame",
    "decode_frames",
    "probe_media",
    "to_rgb",
]

# (height, width) as shown → rows and columns with start and stop inside the picture
PicturePart = Callable[[int, int], tuple[slice, slice]]

# Requested times come from float arithmetic on frame times; a microsecond decides nothing else.
_TIME_TOLERANCE_SECONDS = 1e-6
# Of the median distance of frames; clocks of a millisecond make 30 fps alternate 33 and 34 ms.
_VARIABLE_RATE_TOLERANCE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodedFrames:
    """`frames_THWC` is uint8 RGB as shown (rotation applied).

    `times` is each frame's presentation time in seconds from the video's first frame, float64 [T].
    """

    frames_THWC: np.ndarray
    times: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaInfo:
    """What a video really is. Counts, rate and duration come from decoding, where it was done."""

    container: str
    codec: str
    pixel_format: str
    width: int
    """Width as shown, after rotation."""
    height: int
    """Height as shown, after rotation."""
    upright: bool
    """False if a player has to rotate or mirror the picture."""
    first_pts_seconds: float
    has_b_frames: bool
    num_streams: int
    num_frames: int
    """Frames that decode; 0 if only the header and the first frame were looked at."""
    fps: float
    """One over the mean distance of frames (the median where it varies); 0 if unknown."""
    duration_seconds: float
    """First frame's presentation to the end of the last frame's; 0 if unknown."""
    variable_rate: bool
    max_gop_frames: int
    """Largest distance between keyframes, in frames."""
    partial: str | None
    """Why decoding stopped before the end, if it did, or how much of the file is missing."""


def decode_frames(
    payload: bytes, times: np.ndarray, limits: DecodeLimits, part: PicturePart | None = None
) -> DecodedFrames:
    """For each time the last frame presented at or before it; past the end, the last frame.

    Args:
        payload: The video file.
        times: Ascending seconds from the video's first frame, float64 [T], T ≥ 1.
        limits: What the decode may cost.
        part: Rows and columns to keep of a picture of some height and width; all if left out.
            What is cut away here is never copied, a tenth of the time of a usual crop.

    Raises:
        BadMediaError: The video is refused or cannot be decoded as far as needed.
    """
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0 or not np.isfinite(times).all() or times[0] < 0:
        raise ValueError(f"times must be finite seconds from 0 on, in one dimension: {times}")
    if (np.diff(times) < 0).any():
        raise ValueError(f"times must ascend: {times}")
    with MediaReader(payload, limits) as reader:
        frames = reader.frames_from(float(times[0]))
        return _pick(frames, times, limits, part)


def probe_media(
    source: bytes | Path,
    limits: DecodeLimits,
    *,
    decode_everything: bool = False,
    on_frame: Callable[[TimedFrame], None] | None = None,
) -> MediaInfo:
    """Finds out what a video is; with `decode_everything` whether all of it decodes, too.

    Args:
        source: The file, or its bytes.
        limits: What the decode may cost.
        decode_everything: Decode more than the first frame.
        on_frame: Told every frame that decodes, in the order of presentation.

    Raises:
        BadMediaError: The video is refused, or not even its first frame decodes.
    """
    with MediaReader(source, limits) as reader:
        frames = reader.frames()
        first = next(frames, None)
        if first is None:
            raise BadMediaError(BadReason.UNDECODABLE, "no frame in the video stream")
        times, keyframes = [first.seconds], [0]
        partial = None
        look = on_frame or _look_away
        look(first)
        try:
            for timed in frames if decode_everything else ():
                if timed.frame.key_frame:
                    keyframes.append(len(times))
                times.append(timed.seconds)
                look(timed)
            if decode_everything and (missing := reader.missing_bytes()):
                partial = f"{BadReason.TRUNCATED}: {missing} bytes or more are missing at its end"
        except BadMediaError as error:
            partial = str(error)
        found = _Found(
            times=np.sort(times) if decode_everything else np.empty(0),
            keyframes=keyframes,
            partial=partial,
        )
        return _describe(reader, first.frame, found)


def _look_away(timed: TimedFrame) -> None:
    """Nobody asked to see the frames."""


def _pick(
    frames: Iterator[TimedFrame],
    times: np.ndarray,
    limits: DecodeLimits,
    part: PicturePart | None,
) -> DecodedFrames:
    """Walks frames and times together; only the frames that are taken are converted to RGB."""
    pictures: _Pictures | None = None
    seconds = np.empty(len(times), dtype=np.float64)
    latest = (times + _TIME_TOLERANCE_SECONDS).tolist()
    num_taken = 0
    current: TimedFrame | None = None
    for upcoming in itertools.chain(frames, [None]):
        end = len(times)
        if upcoming is not None:
            end = bisect_left(latest, upcoming.seconds)
        if current is not None and end > num_taken:
            pictures = pictures or _Pictures(len(times), current.frame, limits, part)
            pictures.put(slice(num_taken, end), current.frame)
            seconds[num_taken:end] = current.seconds
            num_taken = end
        if num_taken == len(times):
            break
        current = upcoming
    if pictures is None:
        raise BadMediaError(BadReason.UNDECODABLE, "no frame in the video stream")
    return DecodedFrames(frames_THWC=pictures.frames_THWC, times=seconds)


class _Pictures:
    """The clip's memory, sized by its first frame; later frames of another size are scaled."""

    def __init__(
        self, num_frames: int, frame: VideoFrame, limits: DecodeLimits, part: PicturePart | None
    ) -> None:
        self._stored = (frame.width, frame.height)
        self._reformatter = VideoReformatter()
        num_bytes = num_frames * frame.width * frame.height * 3
        if num_bytes > limits.max_clip_bytes:
            raise BadMediaError(
                BadReason.MEMORY_LIMIT,
                f"{num_frames} frames of {frame.width}×{frame.height} take {num_bytes} bytes, "
                f"the limit is {limits.max_clip_bytes}",
            )
        width, height = shown_size(frame)
        self._shown = (height, width, 3)
        self._part = part(height, width) if part else (slice(0, height), slice(0, width))
        sides = [side.stop - side.start for side in self._part]
        self.frames_THWC = np.empty((num_frames, *sides, 3), dtype=np.uint8)

    def put(self, where: slice, frame: VideoFrame) -> None:
        width, height = self._stored
        picture_HWC = to_rgb(frame, width=width, height=height, reformatter=self._reformatter)
        if picture_HWC.shape != self._shown:
            raise BadMediaError(BadReason.UNDECODABLE, "the picture turns in the middle")
        self.frames_THWC[where] = picture_HWC[self._part]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    times: np.ndarray
    keyframes: list[int]
    partial: str | None


def _describe(reader: MediaReader, first: VideoFrame, found: _Found) -> MediaInfo:
    width, height = shown_size(first)
    times = found.times
    step, variable_rate = _frame_distance(times)
    keyframes = [*found.keyframes, max(len(times), 1)]
    return MediaInfo(
        container=reader.container_name,
        codec=reader.codec_name,
        pixel_format=first.format.name,
        width=width,
        height=height,
        upright=is_upright(first),
        first_pts_seconds=reader.first_pts_seconds,
        has_b_frames=reader.has_b_frames,
        num_streams=reader.num_streams,
        num_frames=len(times),
        fps=1 / step if step > 0 else 0.0,
        duration_seconds=float(times[-1] - times[0]) + step if len(times) else 0.0,
        variable_rate=variable_rate,
        max_gop_frames=max(np.diff(keyframes).tolist(), default=0),
        partial=found.partial,
    )


def _nobody(_: TimedFrame) -> None:
    """Where no one asked to see the frames."""


def _frame_distance(times: np.ndarray) -> tuple[float, bool]:
    """Seconds from frame to frame, and whether they vary: then the median stands for them."""
    distances = np.diff(times)
    if len(distances) == 0:
        return 0.0, False
    median = float(np.median(distances))
    variable = float(np.abs(distances - median).max()) > median * _VARIABLE_RATE_TOLERANCE
    return (median if variable else float(distances.mean())), variable
