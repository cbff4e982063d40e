"""One look at a whole video: what it is, where its scene changes, what its pictures are like.

A single decode serves the check, the shot cut, the filters and the hashes. Of an hour of video
some 28,800 pictures are looked at, and 24 bytes are kept of each.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from data_prep.filters import Pictures, segment_figures
from data_prep.hashes import perceptual_hash
from data_prep.records import SegmentFigures, Source
from data_prep.settings import PrepSettings
from data_prep.shots import ShotFinder, Shots, Span, shots_between, worth_keeping
from pipeline.data.decode import MediaInfo, TimedFrame, probe_media, to_rgb

# The rate that is stored by default: then the pictures looked at are those that are stored.
PICTURES_PER_SECOND = 8
_LONG_SIDE = 128
_LEAST_SIDE = 16
# A tenth of full brightness.
_DARK_LEVEL = 26
_TOLERANCE_SECONDS = 1e-6
# Part of every digest: with another one nothing that was prepared before is known again.
_FACTORS_KEY = 2026


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """Everything that is decided about a video is decided from this."""

    info: MediaInfo
    shots: tuple[Span, ...]
    """Its shots; one if the scene never changes or nobody asked."""
    pictures: Pictures
    frames_sha256: str
    """Digest of its decoded frames: the same for a file that was only packed anew."""

    def figures(self, start: float, end: float) -> SegmentFigures:
        """What the pictures of a segment between two times are like."""
        return segment_figures(self.pictures, (start, end))

    def content_sha256(self, start: float, end: float) -> str:
        """Identity of what a segment between two times shows, whatever the file around it."""
        places = [round(seconds * PICTURES_PER_SECOND) for seconds in (start, end)]
        return hashlib.sha256(f"{self.frames_sha256} {places}".encode()).hexdigest()

    def shots_of(self, source: Source, settings: PrepSettings) -> Shots:
        """The shots to cut segments from: the spans that the source names, or those found.

        Raises:
            BadMediaError: None is long enough.
        """
        if source.spans is None:
            return worth_keeping(self.shots, settings)
        end = self.shots[-1][1]
        wanted = tuple((max(0.0, a), min(b, end)) for a, b in source.spans)
        return worth_keeping(tuple(span for span in wanted if span[0] < span[1]), settings)


def measure(
    source: Path | bytes,
    settings: PrepSettings,
    on_frame: Callable[[TimedFrame], None] = lambda _timed: None,
) -> Measured:
    """Decodes a video from end to end, once.

    Call it in a process that may die, inside `pipeline.data.confine.confined`. A video that
    breaks midway is no error here: `info.partial` says why, and the rest is about what decoded.

    Args:
        source: The file, or its bytes.
        settings: How it is prepared.
        on_frame: Told every frame that decodes as well, in the order of presentation.

    Raises:
        BadMediaError: The video is refused, or not even its first frame decodes.
    """
    look = _Look(settings)

    def see(timed: TimedFrame) -> None:
        look.see(timed)
        on_frame(timed)

    info = probe_media(source, settings.limits, decode_everything=True, on_frame=see)
    pictures = look.finish()
    frame_seconds = 1 / info.fps if info.fps > 0 else 0.0
    shots = shots_between(
        look.changes, pictures.seconds, frame_seconds, max(info.duration_seconds, frame_seconds)
    )
    return Measured(
        info=info, shots=shots, pictures=pictures, frames_sha256=look.digest.hexdigest()
    )


class _Look:
    """Looks at the frame shown at k / PICTURES_PER_SECOND for each k, which is what is stored."""

    def __init__(self, settings: PrepSettings) -> None:
        self._finder = (
            ShotFinder(settings.shot_threshold, PICTURES_PER_SECOND)
            if settings.cut == "shots"
            else None
        )
        self._reformatter = VideoReformatter()
        self._held: TimedFrame | None = None
        self._due_seconds = 0.0
        self._before: np.ndarray | None = None
        self._rows: list[tuple[float, float, float]] = []
        self._hashes: list[int] = []
        self.digest = hashlib.sha256()

    @property
    def changes(self) -> tuple[float, ...]:
        return self._finder.changes if self._finder else ()

    def see(self, timed: TimedFrame) -> None:
        self.digest.update(_checksum(timed.frame))
        if self._held is not None and timed.seconds > self._due_seconds + _TOLERANCE_SECONDS:
            self._look(self._held)
            number = math.ceil((timed.seconds - _TOLERANCE_SECONDS) * PICTURES_PER_SECOND)
            self._due_seconds = number / PICTURES_PER_SECOND
        self._held = timed

    def finish(self) -> Pictures:
        if self._held is not None:
            self._look(self._held)
        rows = np.array(self._rows, dtype=np.float64).reshape(-1, 3)
        # Broken clocks go back now and then; what is looked up by time has to ascend.
        rows[:, 0] = np.maximum.accumulate(rows[:, 0])
        return Pictures(
            seconds=rows[:, 0],
            dark=rows[:, 1].astype(np.float32),
            change=rows[:, 2].astype(np.float32),
            hashes=np.array(self._hashes, dtype=np.uint64),
        )

    def _look(self, timed: TimedFrame) -> None:
        width, height = _small_size(timed.frame)
        rgb_HWC = to_rgb(timed.frame, width=width, height=height, reformatter=self._reformatter)
        bgr_HWC = np.ascontiguousarray(rgb_HWC[:, :, ::-1])
        grey_HW = cv2.cvtColor(bgr_HWC, cv2.COLOR_BGR2GRAY)
        change = 0.0
        if self._before is not None and self._before.shape == grey_HW.shape:
            change = float(cv2.absdiff(grey_HW, self._before).mean())
        self._before = grey_HW
        self._rows.append((timed.seconds, float((grey_HW < _DARK_LEVEL).mean()), change))
        self._hashes.append(perceptual_hash(grey_HW))
        if self._finder is not None:
            self._finder.see(timed.seconds, bgr_HWC)


def _small_size(frame: VideoFrame) -> tuple[int, int]:
    scale = _LONG_SIDE / max(frame.width, frame.height)
    return (
        max(_LEAST_SIDE, round(frame.width * scale)),
        max(_LEAST_SIDE, round(frame.height * scale)),
    )


def _checksum(frame: VideoFrame) -> bytes:
    """Size and checksum of a frame's first plane, without what pads its rows.

    A sum of products with random numbers, modulo 2^64: every bit of every place counts, in a
    quarter of the time of a CRC. The sequence of all frames' goes into a digest.
    """
    plane = frame.planes[0]
    bits = frame.format.components[0].bits
    row_bytes = (
        plane.width * math.ceil(bits / 8)
        if frame.format.is_planar
        else plane.width * frame.format.padded_bits_per_pixel // 8
    )
    content = memoryview(plane)  # pyright: ignore[reportArgumentType]
    rows = np.frombuffer(content, np.uint8).reshape(-1, plane.line_size)[: plane.height]
    words = _words(rows, row_bytes)
    factors = _factors(max(words.shape))
    sums = np.einsum("ij,j->i", words, factors[: words.shape[1]])
    value = int(np.dot(sums, factors[: len(sums)]))
    return f"{frame.width}x{frame.height} {value} ".encode()


def _words(rows: np.ndarray, row_bytes: int) -> np.ndarray:
    """The first bytes of each row as uint64, without a copy where they are whole words."""
    if row_bytes % 8 == 0 and rows.shape[1] % 8 == 0:
        return rows.view(np.uint64)[:, : row_bytes // 8]
    padded = np.zeros((len(rows), math.ceil(row_bytes / 8) * 8), np.uint8)
    padded[:, :row_bytes] = rows[:, :row_bytes]
    return padded.view(np.uint64)


@lru_cache(maxsize=4)
def _factors(num: int) -> np.ndarray:
    """Odd random numbers, always the same ones."""
    return np.random.Philox(key=_FACTORS_KEY).random_raw(num) | np.uint64(1)
