"""The forward actions: where each object that acts stands in every frame.

Each motion takes the generator, the action's progress [T] from 0 to 1, and the ranges to draw
from. Played backwards, the same motion is the other class of its pair. Coordinates are in
picture sides, x to the right and y down, so a growing angle turns clockwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.synthetic.knobs import Knobs
from data_prep.synthetic.looks import Look, draw_look

Array = NDArray[np.floating]
Generator = np.random.Generator


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """Place of one object in every frame, each [T]."""

    x: Array
    y: Array
    angle: Array
    size_x: Array
    """Radius along the object's own x axis, in picture sides."""
    size_y: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """An object with its place in every frame."""

    look: Look
    track: Track
    pivot: tuple[float, float] = (0.0, 0.0)
    """Point of the object, in its radii, that stands at (x, y) and about which it turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """Objects that act, from back to front, and those the sentence names, in its order."""

    layers: tuple[Layer, ...]
    named: tuple[Look, ...]


def still(num_frames: int, *, x: float, y: float, size: float, angle: float = 0.0) -> Track:
    """A track that stays where it is."""
    return track(np.zeros(num_frames, np.float32), x=x, y=y, size=size, angle=angle)


def track(
    progress: Array,
    *,
    x: float | Array,
    y: float | Array,
    size: float | Array,
    angle: float | Array = 0.0,
) -> Track:
    """A track from values that are either constant or given for every frame."""

    def each(value: float | Array) -> Array:
        return np.broadcast_to(np.asarray(value, np.float32), progress.shape)

    return Track(x=each(x), y=each(y), angle=each(angle), size_x=each(size), size_y=each(size))


def _slide(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """One object from left to right, slightly up or down."""
    size, travel = rng.uniform(*knobs.size), rng.uniform(*knobs.travel)
    x = _room(rng, travel / 2 + size) + travel * (progress - 0.5)
    y = _room(rng, size) + rng.uniform(-0.06, 0.06) * (progress - 0.5)
    return _single(rng, track(progress, x=x, y=y, size=size, angle=_tilt(rng)))


def _rise(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """One object from below upwards, slightly sideways."""
    size, travel = rng.uniform(*knobs.size), rng.uniform(*knobs.travel)
    y = _room(rng, travel / 2 + size) - travel * (progress - 0.5)
    x = _room(rng, size) + rng.uniform(-0.06, 0.06) * (progress - 0.5)
    return _single(rng, track(progress, x=x, y=y, size=size, angle=_tilt(rng)))


def _approach(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """One object that grows as if it came closer, at a constant speed in depth's logarithm."""
    growth = rng.uniform(*knobs.growth)
    middle = rng.uniform(*knobs.size) * 1.25
    size = (middle * growth ** (progress - 0.5)).astype(np.float32)
    place = [_room(rng, middle * growth**0.5 * 0.8) for _ in range(2)]
    return _single(rng, track(progress, x=place[0], y=place[1], size=size, angle=_tilt(rng)))


def _cover(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """A large object comes from any side and ends in front of a smaller one that rests."""
    size, far = rng.uniform(*knobs.size) * 0.85, 0.85 * rng.uniform(*knobs.travel) + 0.06
    x, y, heading = _room(rng, size + 0.12), _room(rng, size + 0.12), _turn(rng)
    # From the side where there is more room, or the object could start outside the picture.
    dx = _inwards(x, far * float(np.cos(heading)))
    dy = _inwards(y, far * float(np.sin(heading)))
    hidden = Layer(
        look=draw_look(rng),
        track=track(progress, x=x, y=y, size=size, angle=_tilt(rng)),
    )
    away = 1 - progress
    above = Layer(
        look=draw_look(rng, "square"),
        track=track(
            progress,
            x=x + dx * away,
            y=y + dy * away,
            size=size * 1.4,
            angle=_tilt(rng),
        ),
    )
    return Action(layers=(hidden, above), named=(hidden.look, above.look))


def _spin(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """One object turns clockwise on the spot."""
    size = rng.uniform(*knobs.size) * 1.3
    angle = _turn(rng) + rng.uniform(*knobs.turn) * progress
    x, y = _room(rng, size), _room(rng, size)
    return _single(rng, track(progress, x=x, y=y, size=size, angle=angle))


def _spread(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """Two objects that touch move apart along any axis."""
    size, travel, heading = rng.uniform(*knobs.size) * 0.85, rng.uniform(*knobs.travel), _turn(rng)
    far = size + travel / 2
    x, y = _room(rng, far * 0.8), _room(rng, far * 0.8)
    apart = size + progress * (travel / 2)
    layers = tuple(
        Layer(
            look=draw_look(rng),
            track=track(
                progress,
                x=x + side * np.cos(heading) * apart,
                y=y + side * np.sin(heading) * apart,
                size=size,
                angle=_tilt(rng),
            ),
        )
        for side in (-1, 1)
    )
    return Action(layers=layers, named=tuple(layer.look for layer in layers))


def _swing(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """A lid turns about its hinge at the upper corner of a box, to either side."""
    size, side = rng.uniform(*knobs.size) * 1.2, rng.choice((-1.0, 1.0))
    x, y = _room(rng, size * 1.3), _room(rng, size) + size * 0.6
    box = Layer(look=draw_look(rng, "board"), track=track(progress, x=x, y=y, size=size))
    opening = rng.uniform(*knobs.turn) * 0.75
    hinge = track(
        progress,
        x=x - side * size,
        y=y - size * 0.86,
        size=size,
        angle=side * (np.pi / 2 - opening * progress),
    )
    lid = Layer(look=draw_look(rng, "bar"), track=_narrow(hinge, 0.5), pivot=(0.0, 1.0))
    return Action(layers=(box, lid), named=(lid.look, box.look))


def _topple(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """A bar that stands on its end falls over its lower corner, to either side."""
    size, side = rng.uniform(*knobs.size) * 1.5, rng.choice((-1.0, 1.0))
    x, y = _room(rng, size), _room(rng, size) + size * 0.7
    fallen = track(progress, x=x, y=y, size=size, angle=side * progress * (np.pi / 2))
    bar = Layer(look=draw_look(rng, "bar"), track=fallen, pivot=(side * 0.36, 1.0))
    return Action(layers=(bar,), named=(bar.look,))


def _slip(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """A small object moves behind a larger one that rests."""
    covered = _cover(rng, progress, knobs)
    small, large = covered.layers
    # The roles of the covering motion change: the larger one rests, the smaller one travels.
    dx, dy = large.track.x - small.track.x, large.track.y - small.track.y
    moving = track(
        progress,
        x=small.track.x + dx,
        y=small.track.y + dy,
        size=small.track.size_x,
        angle=small.track.angle,
    )
    resting = track(
        progress,
        x=small.track.x,
        y=small.track.y,
        size=large.track.size_x,
        angle=large.track.angle,
    )
    layers = (Layer(look=small.look, track=moving), Layer(look=large.look, track=resting))
    return Action(layers=layers, named=(small.look, large.look))


def _squash(rng: Generator, progress: Array, knobs: Knobs) -> Action:
    """One object loses most of its height and grows in width while its base stays."""
    size, flat = rng.uniform(*knobs.size) * 1.3, 1 - 1 / rng.uniform(*knobs.growth)
    x, y = _room(rng, size * 1.2), _room(rng, size) + size * 0.8
    upright = track(progress, x=x, y=y, size=size)
    pressed = Track(
        x=upright.x,
        y=upright.y,
        angle=upright.angle,
        size_x=(size * (1 + 0.35 * progress)).astype(np.float32),
        size_y=(size * (1 - flat * progress)).astype(np.float32),
    )
    layer = Layer(look=draw_look(rng), track=pressed, pivot=(0.0, 0.9))
    return Action(layers=(layer,), named=(layer.look,))


MOTIONS: dict[str, Callable[[Generator, Array, Knobs], Action]] = {
    "slide": _slide,
    "rise": _rise,
    "approach": _approach,
    "cover": _cover,
    "spin": _spin,
    "spread": _spread,
    "swing": _swing,
    "topple": _topple,
    "slip": _slip,
    "squash": _squash,
}
"""Forward action by the name a pair gives."""


def _single(rng: Generator, path: Track) -> Action:
    look = draw_look(rng)
    return Action(layers=(Layer(look=look, track=path),), named=(look,))


def _room(rng: Generator, reach: float) -> float:
    """A centre on one axis from which `reach` to both sides stays in the picture if it can."""
    free = max(0.0, 0.5 - reach)
    return 0.5 + float(rng.uniform(-free, free))


def _inwards(place: float, distance: float) -> float:
    """`distance` with the sign that leads from `place` towards the picture's other half."""
    return abs(distance) if place < 0.5 else -abs(distance)


def _turn(rng: Generator) -> float:
    return float(rng.uniform(0, 2 * np.pi))


def _tilt(rng: Generator) -> float:
    return float(rng.uniform(-0.5, 0.5))


def _narrow(path: Track, factor: float) -> Track:
    width = path.size_x * np.float32(factor)
    return Track(x=path.x, y=path.y, angle=path.angle, size_x=width, size_y=path.size_y)
