"""How an object looks: outline, pattern, two colours, and the words for it."""

from dataclasses import dataclass

import numpy as np

HUES: dict[str, float] = {
    "red": 0.0,
    "orange": 0.075,
    "yellow": 0.15,
    "green": 0.34,
    "turquoise": 0.48,
    "blue": 0.61,
    "violet": 0.75,
    "pink": 0.9,
}
"""Name of a colour and its place on the colour circle."""

_NOUNS = ("disc", "square", "triangle", "hexagon", "cross", "ring", "crescent", "star")
_PATTERNS = ("striped", "chequered", "dotted", "ringed", "wavy", "mottled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """Surface of one object; fixed through the clip."""

    shape: str
    pattern: str
    name: str
    """Noun phrase for the caption, article included."""
    colour: tuple[float, float, float]
    """Main colour, RGB from 0 to 1."""
    second_colour: tuple[float, float, float]
    frequency: float
    """Radians of pattern per radius."""
    pattern_angle: float
    phase: float


def draw_look(rng: np.random.Generator, shape: str | None = None) -> Look:
    """Draw an object's surface, with a given outline if its part in the action asks for one."""
    noun = shape or str(rng.choice(_NOUNS))
    pattern = str(rng.choice(_PATTERNS))
    first, second = rng.choice(len(HUES), size=2, replace=False)
    colour_name = list(HUES)[first]
    hues = list(HUES.values())
    return Look(
        shape=noun,
        pattern=pattern,
        name=f"{'an' if pattern[0] in 'aeiou' else 'a'} {pattern} {colour_name} {noun}",
        colour=_rgb(hues[first] + rng.uniform(-0.02, 0.02), rng.uniform(0.65, 1.0), 0.95),
        second_colour=_rgb(hues[second], rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.7)),
        frequency=rng.uniform(3.5, 8.0),
        pattern_angle=rng.uniform(0, np.pi),
        phase=rng.uniform(0, 2 * np.pi),
    )


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """HSV to RGB, all from 0 to 1 (hue wraps)."""
    sixths = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    strength = np.clip(np.minimum(sixths, 4 - sixths), 0, 1)
    red, green, blue = value * (1 - saturation * strength)
    return float(red), float(green), float(blue)
