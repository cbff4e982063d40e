"""Which segments are worth storing, by figures of their pictures.

Every threshold is a setting and every figure is kept, so a dataset can be asked later why a
segment is in it. There is no filter for overlaid text: what small code can measure (edges,
stable regions) fires on fences and screens as readily as on captions.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.hashes import HASHES_PER_SEGMENT, to_text
from data_prep.records import SegmentFigures
from data_prep.settings import PrepSettings
from data_prep.shots import Span
from pipeline.data.badmedia import BadReason

# A scene at night or in space is dark on average, yet something in it is bright.
_BLACK_SHARE = 0.98
# Of 255, as shown: noise of the camera and the encoder's blocks stay below.
_STILL_CHANGE = 0.5
_TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pictures:
    """What was seen of a whole video, one value for each picture that was looked at [N]."""

    seconds: np.ndarray
    """Presentation time from the first frame, ascending, float64."""
    dark: np.ndarray
    """Share of the picture below a tenth of full brightness, float32."""
    change: np.ndarray
    """Mean change of the grey levels since the picture before, float32; 0 for the first."""
    hashes: np.ndarray
    """Perceptual hash, uint64; 0 where a picture shows nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfit:
    """Why a segment is not stored."""

    reason: BadReason
    detail: str
    figures: dict[str, float]
    """The figures that decide."""


def segment_figures(pictures: Pictures, span: Span) -> SegmentFigures:
    """The figures of one segment; the change that leads into it does not count."""
    first, end = np.searchsorted(pictures.seconds, np.array(span) - _TOLERANCE_SECONDS)
    # A segment between two looks shows what the look before it showed.
    first = min(int(first), len(pictures.seconds) - 1)
    own = slice(first, max(int(end), first + 1))
    seconds, change = pictures.seconds[own], pictures.change[own][1:]
    elapsed = float(seconds[-1] - seconds[0])
    return SegmentFigures(
        motion=round(float(change.sum()) / elapsed, 3) if elapsed > 0 else 0.0,
        black_share=_share(pictures.dark[own] >= _BLACK_SHARE),
        still_share=_share(change < _STILL_CHANGE) if len(change) else 1.0,
        hashes=to_text(pictures.hashes[own][_spread(len(seconds))]),
    )


def unfit(figures: SegmentFigures, settings: PrepSettings) -> Unfit | None:
    """Why a segment with these figures is not wanted; None if it is."""
    failed = next((rule for rule in _rules(figures, settings) if rule[0]), None)
    if failed is None:
        return None
    deciding = {
        "motion": figures.motion,
        "black_share": figures.black_share,
        "still_share": figures.still_share,
    }
    return Unfit(reason=failed[1], detail=failed[2], figures=deciding)


def _rules(
    figures: SegmentFigures, settings: PrepSettings
) -> tuple[tuple[bool, BadReason, str], ...]:
    black, still, motion = figures.black_share, figures.still_share, figures.motion
    return (
        (
            black > settings.max_black_share,
            BadReason.BLACK,
            f"{black:.0%} of its pictures are black, "
            f"at most {settings.max_black_share:.0%} are wanted",
        ),
        (
            still > settings.max_still_share,
            BadReason.STILL,
            f"{still:.0%} of its pictures are like the one before, "
            f"at most {settings.max_still_share:.0%} are wanted",
        ),
        (
            motion < settings.min_motion,
            BadReason.LITTLE_MOTION,
            f"{motion:.3g} grey levels a second, at least {settings.min_motion:g} are wanted",
        ),
    )


def _share(holds: np.ndarray) -> float:
    return round(float(holds.mean()), 4)


def _spread(num_pictures: int) -> np.ndarray:
    """Which of a segment's pictures its hashes are of; the middles of equal parts."""
    middles = (np.arange(HASHES_PER_SEGMENT) + 0.5) / HASHES_PER_SEGMENT
    return (middles * num_pictures).astype(np.int64)
