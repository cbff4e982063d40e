"""Outlines and surface patterns of the rendered objects, as functions of local coordinates.

An outline is a signed distance (negative inside) in units of the object's own radius, so that
the renderer gets anti-aliased edges at any size and angle without supersampling.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    """Signed distance to an axis-aligned rectangle."""
    outside_x = np.abs(x) - np.float32(half_width)
    outside_y = np.abs(y) - np.float32(half_height)
    return np.maximum(outside_x, outside_y)


def _disc(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - np.float32(1)


def _square(x: Array, y: Array) -> Array:
    return box(x, y, 0.82, 0.82)


def _bar(x: Array, y: Array) -> Array:
    return box(x, y, 0.36, 1.0)


def _board(x: Array, y: Array) -> Array:
    return box(x, y, 1.0, 0.7)


def _triangle(x: Array, y: Array) -> Array:
    side = np.float32(0.8660254) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(y, side) - np.float32(0.5)


def _hexagon(x: Array, y: Array) -> Array:
    tall = np.abs(y)
    slanted = np.float32(0.8660254) * np.abs(x) + np.float32(0.5) * tall
    return np.maximum(slanted, tall) - np.float32(0.866)


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(box(x, y, 1.0, 0.36), box(x, y, 0.36, 1.0))


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - np.float32(0.7)) - np.float32(0.3)


def _crescent(x: Array, y: Array) -> Array:
    return np.maximum(_disc(x, y), np.float32(0.75) - np.hypot(x - np.float32(0.6), y))


def _star(x: Array, y: Array) -> Array:
    # Fold the plane onto one half of one of five points, then measure against its edge, the
    # line from the tip (1, 0) to the notch at radius 0.45 and 36 degrees.
    sector = np.float32(2 * np.pi / 5)
    angle = np.abs(np.mod(np.arctan2(y, x) + sector / 2, sector) - sector / 2)
    radius = np.hypot(x, y)
    notch_x, notch_y = 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)
    length = np.hypot(1 - notch_x, notch_y)
    normal_x, normal_y = np.float32(notch_y / length), np.float32((1 - notch_x) / length)
    return radius * (np.cos(angle) * normal_x + np.sin(angle) * normal_y) - normal_x


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": _disc,
    "square": _square,
    "bar": _bar,
    "board": _board,
    "triangle": _triangle,
    "hexagon": _hexagon,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "star": _star,
}
"""Outline by name; the name is also the noun of the object in its caption."""


def _striped(u: Array, _: Array) -> Array:
    return np.sin(u)


def _chequered(u: Array, v: Array) -> Array:
    return np.sin(u) * np.sin(v) * np.float32(1.6)


def _dotted(u: Array, v: Array) -> Array:
    return np.sin(u) + np.sin(v) - np.float32(0.7)


def _ringed(u: Array, v: Array) -> Array:
    return np.sin(np.hypot(u, v) * np.float32(1.3))


def _wavy(u: Array, v: Array) -> Array:
    return np.sin(u + np.float32(1.5) * np.sin(v * np.float32(0.8)))


def _mottled(u: Array, v: Array) -> Array:
    return np.sin(u + np.float32(1.7) * np.sin(v)) * np.sin(v + np.float32(2.1) * np.sin(u))


PATTERNS: dict[str, Callable[[Array, Array], Array]] = {
    "striped": _striped,
    "chequered": _chequered,
    "dotted": _dotted,
    "ringed": _ringed,
    "wavy": _wavy,
    "mottled": _mottled,
}
"""Pattern by name: roughly −1 where the first colour is, +1 where the second is."""
