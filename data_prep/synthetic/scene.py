"""What a clip shows, drawn from (seed, video number) alone.

The forward action is drawn first; whether the clip is played backwards is the class. Everything
that is drawn beside the action (camera shake, background drift, brightness, the distractors'
wobble, the easing of the action) has the same distribution in both directions of time, so no
single frame and nothing in the surroundings tells the two classes of a pair apart.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.synthetic.classes import PAIRS, Pair, bare, class_numbers, fill
from data_prep.synthetic.knobs import ClipShape, Knobs
from data_prep.synthetic.looks import draw_look
from data_prep.synthetic.motions import MOTIONS, Array, Layer, Track, still

Generator = np.random.Generator

_CLASS_STREAM, _CLIP_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """What happens to the whole picture, one value per frame [T]."""

    shake_x: Array
    """Displacement of everything to the right, in picture sides."""
    shake_y: Array
    pan_x: Array
    """Place on the background that the picture's centre shows, in picture sides from its centre."""
    pan_y: Array
    zoom: Array
    """Picture sides of background per picture side; below one magnifies."""
    brightness: Array
    """Factor on all colours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One clip, ready to render."""

    pair: Pair
    backward: bool
    """True if the frames are shown in reverse order."""
    layers: tuple[Layer, ...]
    """Objects from back to front: distractors, then those that act."""
    placeholders: tuple[str, ...]
    camera: Camera
    background_seed: int
    contrast: float

    @property
    def template(self) -> str:
        """The class's template, with brackets."""
        return self.pair.backward if self.backward else self.pair.forward

    @property
    def sentence(self) -> str:
        """The template with the objects' names filled in."""
        return fill(self.template, self.placeholders)


def class_of(seed: int, video: int, num_pairs: int) -> int:
    """Class number of a video: each 2·`num_pairs` numbers from 1 on have every class once."""
    block, place = divmod(video - 1, 2 * num_pairs)
    order = np.random.default_rng([seed, _CLASS_STREAM, block]).permutation(2 * num_pairs)
    return int(order[place])


def draw_scene(seed: int, video: int, num_pairs: int, shape: ClipShape) -> Scene:
    """Everything about one clip; a pure function of its arguments."""
    number = class_of(seed, video, num_pairs)
    pair, backward = next(
        (pair, template == pair.backward)
        for pair in PAIRS[:num_pairs]
        for template in (pair.forward, pair.backward)
        if class_numbers(num_pairs)[bare(template)] == number
    )
    # The class is no part of the clip's stream: both directions draw from the same numbers.
    return compose(np.random.default_rng([seed, _CLIP_STREAM, video]), pair, backward, shape)


def compose(rng: Generator, pair: Pair, backward: bool, shape: ClipShape) -> Scene:
    """Draw a clip of one class from a generator; `backward` does not touch the generator."""
    knobs = Knobs.at(shape.difficulty)
    seconds = shape.times()
    action = MOTIONS[pair.motion](rng, _progress(rng, seconds, knobs), knobs)
    # The number of objects must not tell the class, so those that act count into it.
    num_objects = int(rng.integers(2, 3 + knobs.max_distractors))
    distractors = tuple(
        _distractor(rng, seconds, knobs) for _ in range(max(0, num_objects - len(action.layers)))
    )
    return Scene(
        pair=pair,
        backward=backward,
        layers=distractors + action.layers,
        placeholders=tuple(look.name for look in action.named),
        camera=_draw_camera(rng, seconds, knobs),
        background_seed=int(rng.integers(2**32)),
        contrast=knobs.background_contrast,
    )


def _progress(rng: Generator, seconds: Array, knobs: Knobs) -> Array:
    """How far the action has come in each frame, from 0 to 1, with rest before and after."""
    duration = seconds[-1] * rng.uniform(*knobs.action_share)
    start = rng.uniform(0, seconds[-1] - duration)
    linear = np.clip((seconds - start) / duration, 0, 1)
    # An S-curve, then a bend whose two directions are equally likely: the law of the easing is
    # the same backwards, or gravity-like speed-up would give the direction away.
    steepness = rng.uniform(1.0, 1.8)
    eased = linear**steepness / (linear**steepness + (1 - linear) ** steepness)
    bend = rng.uniform(1.0, 1.4)
    bent = eased**bend if rng.random() < 0.5 else 1 - (1 - eased) ** bend
    return bent.astype(np.float32)


def _distractor(rng: Generator, seconds: Array, knobs: Knobs) -> Layer:
    x, y = rng.uniform(0.08, 0.92, size=2)
    track = still(len(seconds), x=x, y=y, size=rng.uniform(*knobs.size), angle=_angle(rng))
    wobble_x, wobble_y, turn = (_waver(rng, seconds, (0.6, 1.8)) for _ in range(3))
    return Layer(
        look=draw_look(rng),
        track=Track(
            x=track.x + wobble_x * knobs.wobble,
            y=track.y + wobble_y * knobs.wobble,
            angle=track.angle + turn * (8 * knobs.wobble),
            size_x=track.size_x,
            size_y=track.size_y,
        ),
    )


def _draw_camera(rng: Generator, seconds: Array, knobs: Knobs) -> Camera:
    middle = seconds / seconds[-1] - np.float32(0.5)
    heading, drift = _angle(rng), rng.uniform(0.2, 1.0) * knobs.pan
    at_x, at_y = rng.uniform(-0.05, 0.05, size=2)
    magnification = rng.uniform(-1, 1) * knobs.zoom
    return Camera(
        shake_x=_waver(rng, seconds, (0.5, 2.5)) * knobs.shake,
        shake_y=_waver(rng, seconds, (0.5, 2.5)) * knobs.shake,
        pan_x=(at_x + middle * (drift * np.cos(heading))).astype(np.float32),
        pan_y=(at_y + middle * (drift * np.sin(heading))).astype(np.float32),
        zoom=(rng.uniform(0.75, 1.0) * np.exp(middle * magnification)).astype(np.float32),
        brightness=1 + _waver(rng, seconds, (0.1, 0.5)) * knobs.brightness,
    )


def _waver(rng: Generator, seconds: Array, hertz: tuple[float, float]) -> Array:
    """A smooth random path around zero; uniform phases make its law the same backwards."""
    frequency, phase = rng.uniform(*hertz, size=(3, 1)), rng.uniform(0, 2 * np.pi, size=(3, 1))
    return np.sin(2 * np.pi * frequency * seconds + phase).mean(axis=0).astype(np.float32)


def _angle(rng: Generator) -> float:
    return float(rng.uniform(0, 2 * np.pi))
