"""An opened video: its frames in the order of presentation, bounded in time, memory and pixels.

The only importer of PyAV in the pipeline. Headers lie about rates, counts and durations (a third
of odd files do), so nothing but the presentation times of decoded frames is believed. Videos are
opened through a file object with no protocol allowed, so a playlist cannot make FFmpeg open
other files or addresses, and the limits are set before FFmpeg looks at the first frame: a file
of 26 KB can otherwise take a gibibyte merely to be opened.
"""

import io
import itertools
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.sidedata.sidedata import SideDataContainer  # noqa: F401 - for picture.py
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter  # noqa: F401 - for picture.py
from av.video.stream import VideoStream

from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.completeness import missing_bytes
from pipeline.data.confine import DecodeLimits

# Below this a seek (it decodes the first frame twice) costs more than decoding straight on.
_MIN_SEEK_SECONDS = 0.5
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpeg,mpegts,mpegvideo,ogg,asf,"
    "gif,mp3,wav,aac,flac,h264,hevc,ivf,obu"
)
_VIDEO_CODECS = frozenset(
    {
        *("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "h263", "gif"),
        *("theora", "flv1", "mjpeg", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "prores", "dnxhd"),
    }
)
# Demuxers with a true index: after a seek their timestamps are those of a linear read.
_SEEKABLE_FORMATS = frozenset({"mov", "matroska"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedFrame:
    """One decoded frame and its presentation time in seconds from the video's first frame."""

    seconds: float
    frame: VideoFrame


class MediaReader:
    """An opened video: its best video stream, decoded by one thread under a deadline.

    A context manager. The deadline of `limits.max_seconds` runs from the opening.
    """

    def __init__(self, source: bytes | Path, limits: DecodeLimits) -> None:
        self._limits = limits
        # Of this thread: a decode that others keep from running is not a slow one.
        self._deadline = time.thread_time() + limits.max_seconds
        self._file = _open_source(source, limits)
        try:
            self._container = _open_container(self._file, limits)
            self._stream = _video_stream(self._container, limits)
        except BaseException:
            self._file.close()
            raise
        self._first_pts: int | None = None
        self._tick_seconds = self._stream.time_base or Fraction(1, av.time_base)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._container.close()
        self._file.close()

    def frames(self) -> Iterator[TimedFrame]:
        """All frames from the first, in the order of presentation.

        Raises:
            BadMediaError: Decoding fails or takes too long; frames before that were yielded.
        """
        for frame in self._decoded():
            pts = _pts(frame)
            if self._first_pts is None:
                self._first_pts = pts
            yield TimedFrame(seconds=self._clock(pts - self._first_pts), frame=frame)

    def frames_from(self, seconds: float) -> Iterator[TimedFrame]:
        """Frames of which one is presented at or before `seconds`, decoding as few as possible."""
        beginning = self.frames()
        first = next(beginning, None)
        if first is None:
            raise BadMediaError(BadReason.UNDECODABLE, "no frame in the video stream")
        if not self._seekable(seconds):
            return itertools.chain([first], beginning)
        later = self._after_seek(seconds)
        if later is None:
            self._reopen()
            later = self.frames()
        return later

    @property
    def container_name(self) -> str:
        """FFmpeg's name of the container's family, such as `mov` or `matroska`."""
        return self._container.format.name.split(",")[0]

    @property
    def codec_name(self) -> str:
        """The codec's name, whichever decoder is at work."""
        return self._stream.codec_context.codec.canonical_name

    @property
    def num_streams(self) -> int:
        """Streams of any kind in the file."""
        return len(self._container.streams)

    @property
    def has_b_frames(self) -> bool:
        """Whether frames are stored in another order than they are shown in."""
        return bool(self._stream.codec_context.has_b_frames)

    @property
    def first_pts_seconds(self) -> float:
        """Presentation time of the first frame by the file's own clock; 0 before it is decoded."""
        return self._clock(self._first_pts or 0)

    def missing_bytes(self) -> int:
        """Bytes that the file lacks by its own account; ask when its frames have been read."""
        return missing_bytes(self._file, self.container_name)

    def _decoded(self) -> Iterator[VideoFrame]:
        try:
            for packet in self._container.demux(self._stream):
                if time.thread_time() > self._deadline:
                    raise BadMediaError(
                        BadReason.TIME_LIMIT, f"not decoded in {self._limits.max_seconds:g} s"
                    )
                for frame in packet.decode():
                    _check_picture(frame.width, frame.height, self._limits)
                    yield frame
        except (FFmpegError, MemoryError) as error:
            raise _refusal(BadReason.UNDECODABLE, error, self._limits) from error

    def _seekable(self, seconds: float) -> bool:
        """Whether seeking saves work: a keyframe other than the first stands before `seconds`."""
        if seconds < _MIN_SEEK_SECONDS or self.container_name not in _SEEKABLE_FORMATS:
            return False
        entries = self._stream.index_entries
        # Matroska reads its index at the first seek only.
        return len(entries) == 0 or entries.search_timestamp(self._target(seconds)) > 0

    def _after_seek(self, seconds: float) -> Iterator[TimedFrame] | None:
        """Frames from a keyframe at or before `seconds` on; None if seeking does not lead there."""
        for step_back_seconds in (0.0, 1.0):
            try:
                self._container.seek(
                    self._target(max(0.0, seconds - step_back_seconds)), stream=self._stream
                )
            except FFmpegError:
                return None
            frames = self.frames()
            for timed in frames:
                # Frames before the keyframe in an open group lack what they refer to.
                if timed.frame.key_frame:
                    break
            else:
                return None
            if timed.seconds <= seconds:
                return itertools.chain([timed], frames)
        return None

    def _reopen(self) -> None:
        """Back to the very first frame; seeking to 0 does not lead there in every file."""
        self._container.close()
        self._file.seek(0)
        self._container = _open_container(self._file, self._limits)
        self._stream = _video_stream(self._container, self._limits)

    def _target(self, seconds: float) -> int:
        return (self._first_pts or 0) + int(seconds / self._tick_seconds)

    def _clock(self, pts: int) -> float:
        # As exact as a product of fractions, at a tenth of its time; it runs for every frame.
        return pts * self._tick_seconds.numerator / self._tick_seconds.denominator


def _pts(frame: VideoFrame) -> int:
    """The presentation time in the stream's ticks; some old containers have decode times only."""
    pts = frame.pts if frame.pts is not None else frame.dts
    if pts is None:
        raise BadMediaError(BadReason.UNDECODABLE, "a frame has no presentation time")
    return pts


def _open_source(source: bytes | Path, limits: DecodeLimits) -> BinaryIO:
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
        size = len(source)
    else:
        file, size = _open_regular(source)
    if size == 0 or size > limits.max_bytes:
        file.close()
        reason = BadReason.TOO_MANY_BYTES if size else BadReason.EMPTY
        raise BadMediaError(reason, f"{size} bytes, the limit is {limits.max_bytes}")
    return file


def _open_regular(path: Path) -> tuple[BinaryIO, int]:
    try:
        # Without O_NONBLOCK a pipe in a video's place would block the open for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadMediaError(BadReason.NOT_A_FILE, f"cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BadMediaError(BadReason.NOT_A_FILE, "a device, pipe or folder")
    return os.fdopen(descriptor, "rb"), status.st_size


def _open_container(file: BinaryIO, limits: DecodeLimits) -> InputContainer:
    try:
        return av.open(
            file,
            "r",
            container_options={
                "format_whitelist": _FORMATS,
                "protocol_whitelist": "none",
                "max_streams": "64",
            },
            options={"max_pixels": str(limits.max_pixels)},
            metadata_errors="replace",
            timeout=limits.max_seconds,
        )
    except (FFmpegError, MemoryError) as error:
        raise _refusal(BadReason.NOT_A_VIDEO, error, limits) from error


def _video_stream(container: InputContainer, limits: DecodeLimits) -> VideoStream:
    """The best video stream, set to decode in this thread; cover pictures do not count."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise BadMediaError(BadReason.NO_VIDEO_STREAM)
    context = stream.codec_context
    if context is None or context.codec.canonical_name not in _VIDEO_CODECS:
        name = "unknown" if context is None else context.codec.canonical_name
        raise BadMediaError(BadReason.CODEC_NOT_ALLOWED, name)
    _check_picture(context.width, context.height, limits)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    context.thread_type = "NONE"
    context.thread_count = 1
    # A picture may grow in the middle of a stream; the limit given at open is the header's.
    context.options = {"max_pixels": str(limits.max_pixels)}
    return stream


def _check_picture(width: int, height: int, limits: DecodeLimits) -> None:
    if width <= 0 or height <= 0:
        raise BadMediaError(BadReason.UNDECODABLE, "no picture size in the header")
    if width * height > limits.max_pixels:
        raise BadMediaError(
            BadReason.TOO_LARGE, f"{width}×{height}, the limit is {limits.max_pixels} pixels"
        )


def _refusal(reason: BadReason, error: BaseException, limits: DecodeLimits) -> BadMediaError:
    if isinstance(error, MemoryError):
        limit = f"more than {limits.max_memory_bytes} bytes, or all that the machine has"
        return BadMediaError(BadReason.MEMORY_LIMIT, limit)
    return BadMediaError(reason, _first_line(error))


def _first_line(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, FFmpegError) else None) or repr(error)
    return text.splitlines()[0][:200]
