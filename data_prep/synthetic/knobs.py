"""Size of a clip, and what difficulty means in numbers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipShape:
    """Picture side in pixels, length and frame rate of the clips, and how hard they are."""

    size: int
    seconds: float
    fps: int
    difficulty: float

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return round(self.seconds * self.fps)

    def times(self) -> NDArray[np.float32]:
        """Seconds from the start of the clip at which its frames stand."""
        return (np.arange(self.num_frames) / self.fps).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Knobs:
    """Ranges of what is drawn. Lengths are in picture sides, an object's size is its radius."""

    travel: tuple[float, float]
    """Distance an object moves in the course of its action."""
    turn: tuple[float, float]
    """Angle of a spin in radians."""
    growth: tuple[float, float]
    """Factor by which an object comes closer."""
    size: tuple[float, float]
    action_share: tuple[float, float]
    """Share of the clip that the action takes."""
    shake: float
    """Most that the camera strays from its place."""
    pan: float
    """How far the background drifts in the course of a clip; any direction, whatever the class."""
    zoom: float
    """Logarithm of the factor by which the background grows or shrinks in a clip."""
    brightness: float
    wobble: float
    """How far a distractor strays from its place."""
    max_distractors: int
    background_contrast: float

    @classmethod
    def at(cls, difficulty: float) -> "Knobs":
        """Ranges between the easiest (0) and the hardest (1) setting."""

        def between(easy: float, hard: float) -> float:
            return easy + (hard - easy) * difficulty

        return cls(
            travel=(between(0.42, 0.2), between(0.6, 0.4)),
            turn=(between(2.0, 1.0), between(3.6, 2.4)),
            growth=(between(2.2, 1.4), between(3.2, 2.0)),
            size=(between(0.14, 0.08), between(0.19, 0.14)),
            action_share=(between(0.75, 0.4), between(1.0, 0.9)),
            shake=between(0.0, 0.03),
            pan=between(0.0, 0.3),
            zoom=between(0.0, 0.2),
            brightness=between(0.0, 0.3),
            wobble=between(0.0, 0.04),
            max_distractors=round(between(0, 4)),
            background_contrast=between(0.25, 0.9),
        )
