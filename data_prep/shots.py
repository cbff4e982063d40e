"""Where a video's scene changes, and which of its shots are worth cutting segments from.

The detector is PySceneDetect's, fed with small pictures of our own decoder: its own reader would
meet the odd files, and counts frames where times are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scenedetect import AdaptiveDetector, FrameTimecode
from scenedetect.common import Timecode

from data_prep.settings import PrepSettings
from pipeline.data.badmedia import BadMediaError, BadReason

# Two changes within this time are one: a flash, or a fast fade.
_MIN_SHOT_SECONDS = 0.5
_TICKS_PER_SECOND = 1_000_000
_TOLERANCE_SECONDS = 1e-6

Span = tuple[float, float]
"""Start and end in seconds from a video's first frame; the end is no longer in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shots:
    """What segments are cut from, and what is too short for one."""

    kept: tuple[Span, ...]
    too_short: tuple[Span, ...]


class ShotFinder:
    """Is shown small pictures in the order of time and finds where the scene changes.

    Args:
        threshold: How many times the change around it a scene's change must be.
        pictures_per_second: How many it is shown, at most.
    """

    def __init__(self, threshold: float, pictures_per_second: int) -> None:
        self._rate = Fraction(pictures_per_second)
        self._detector = AdaptiveDetector(
            adaptive_threshold=threshold, min_scene_len=_MIN_SHOT_SECONDS
        )
        self._found: list[float] = []

    def see(self, seconds: float, bgr_HWC: np.ndarray) -> None:
        """The next picture, uint8 in the order blue, green, red."""
        ticks = Timecode(
            pts=round(seconds * _TICKS_PER_SECOND), time_base=Fraction(1, _TICKS_PER_SECOND)
        )
        found = self._detector.process_frame(FrameTimecode(ticks, fps=self._rate), bgr_HWC)
        self._found += [cut.seconds for cut in found]

    @property
    def changes(self) -> tuple[float, ...]:
        """Times of the pictures with which a new shot begins."""
        return tuple(self._found)


def shots_between(
    changes: Sequence[float], seen: np.ndarray, frame_seconds: float, end: float
) -> tuple[Span, ...]:
    """The shots of a video.

    Only some frames are looked at, so a change lies somewhere between two of them. What is in
    between belongs to neither shot: at the stored rate there is no frame, at a higher one it
    would show the wrong scene.

    Args:
        changes: Times of pictures with which a new shot begins, ascending.
        seen: Times of all pictures that were looked at, ascending, float64 [N].
        frame_seconds: How long the video shows one frame.
        end: End of the video.
    """
    spans, start = [], 0.0
    for change in changes:
        number = int(np.searchsorted(seen, change - _TOLERANCE_SECONDS))
        if 0 < number < len(seen):
            begins = float(seen[number])
            spans.append((start, min(begins, float(seen[number - 1]) + frame_seconds)))
            start = begins
    return (*spans, (start, end))


def worth_keeping(shots: Sequence[Span], settings: PrepSettings) -> Shots:
    """Which shots segments are cut from.

    A video of one shot is kept from `min_seconds` on, so that collections of short clips stay
    whole. Of a video of several, shots are kept from `min_shot_seconds` on; if none is as long,
    the longest one is, so that no video is lost to its cuts alone.

    Raises:
        BadMediaError: None has `min_seconds`.
    """
    lengths = [end - start + _TOLERANCE_SECONDS for start, end in shots]
    longest = max(lengths, default=0.0)
    if longest < settings.min_seconds:
        what = f"the longest of {len(shots)} shots has" if len(shots) > 1 else "it has"
        raise BadMediaError(
            BadReason.TOO_SHORT,
            f"{what} {longest:.3f} s, at least {settings.min_seconds:g} are needed",
        )
    least = max(settings.min_seconds, settings.min_shot_seconds)
    first_longest = lengths.index(longest)
    fits = [
        length >= least or (number == first_longest and longest < least)
        for number, length in enumerate(lengths)
    ]
    return Shots(
        kept=tuple(shot for shot, fit in zip(shots, fits, strict=True) if fit),
        too_short=tuple(shot for shot, fit in zip(shots, fits, strict=True) if not fit),
    )
