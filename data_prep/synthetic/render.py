"""A scene → frames, in numpy alone and all frames at once.

Every object is evaluated in a window just large enough for it, [T, side, side], with the window's
corner on whole pixels, so the cost follows the objects' size rather than the picture's.
"""

import numpy as np
from numpy.typing import NDArray

from data_prep.synthetic.background import render_background
from data_prep.synthetic.knobs import ClipShape
from data_prep.synthetic.looks import Look
from data_prep.synthetic.motions import Layer
from data_prep.synthetic.scene import Camera, Scene
from data_prep.synthetic.shapes import PATTERNS, SHAPES

Array = NDArray[np.floating]

# The farthest point of any outline from its centre, in radii (the corner of the board is 1.22).
_REACH = 1.25


def render(scene: Scene, shape: ClipShape) -> NDArray[np.uint8]:
    """The frames of a scene, uint8 RGB [T, size, size, 3], in the order they are shown."""
    canvas_THWC = render_background(
        scene.camera, seed=scene.background_seed, contrast=scene.contrast, size=shape.size
    )
    for layer in scene.layers:
        _paint(canvas_THWC, layer, scene.camera)
    canvas_THWC *= (scene.camera.brightness * 255)[:, None, None, None]
    frames = np.clip(canvas_THWC + np.float32(0.5), 0, 255).astype(np.uint8)
    return frames[::-1] if scene.backward else frames


def _paint(canvas_THWC: Array, layer: Layer, camera: Camera) -> None:
    """Blend one object over the canvas, in place."""
    side = canvas_THWC.shape[1]
    x, y, left_T, top_T = _local_coordinates(layer, camera, side)
    distance = SHAPES[layer.look.shape](x, y)  # [T, w, w], in radii
    track = layer.track
    pixels_per_radius = (np.sqrt(track.size_x * track.size_y) * side)[:, None, None]
    alpha = np.clip(np.float32(0.5) - distance * pixels_per_radius, 0, 1)
    colour = _surface(layer.look, x, y, distance)
    width = alpha.shape[1]
    for frame, (left, top) in enumerate(zip(left_T.tolist(), top_T.tolist(), strict=True)):
        rows = slice(max(0, -top), min(width, side - top))
        columns = slice(max(0, -left), min(width, side - left))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        part = canvas_THWC[
            frame,
            top + rows.start : top + rows.stop,
            left + columns.start : left + columns.stop,
        ]
        cover = alpha[frame, rows, columns, None]
        part += cover * (colour[frame, rows, columns] - part)


def _local_coordinates(
    layer: Layer, camera: Camera, side: int
) -> tuple[Array, Array, NDArray[np.int64], NDArray[np.int64]]:
    """The window's pixel centres in the object's radii [T, w, w], and its corner [T] in pixels."""
    track = layer.track
    cos, sin = np.cos(track.angle), np.sin(track.angle)
    offset_x, offset_y = layer.pivot[0] * track.size_x, layer.pivot[1] * track.size_y
    centre_x = (track.x + camera.shake_x - (cos * offset_x - sin * offset_y)) * side
    centre_y = (track.y + camera.shake_y - (sin * offset_x + cos * offset_y)) * side
    reach = _REACH * side * float(np.maximum(track.size_x, track.size_y).max()) + 1
    width = int(np.ceil(2 * reach)) + 1
    left_T = np.floor(centre_x - reach).astype(np.int64)
    top_T = np.floor(centre_y - reach).astype(np.int64)
    steps = np.arange(width, dtype=np.float32) + np.float32(0.5)
    dx = (steps + (left_T - centre_x)[:, None]).astype(np.float32)[:, None, :]
    dy = (steps + (top_T - centre_y)[:, None]).astype(np.float32)[:, :, None]
    scale_x, scale_y = track.size_x * side, track.size_y * side
    x = (cos / scale_x)[:, None, None] * dx + (sin / scale_x)[:, None, None] * dy
    y = (cos / scale_y)[:, None, None] * dy - (sin / scale_y)[:, None, None] * dx
    return x, y, left_T, top_T


def _surface(look: Look, x: Array, y: Array, distance: Array) -> Array:
    """Colour of every window pixel, RGB [T, w, w, 3]."""
    cos, sin = np.cos(look.pattern_angle), np.sin(look.pattern_angle)
    along = np.float32(look.frequency * cos) * x + np.float32(look.frequency * sin) * y
    across = np.float32(look.frequency * cos) * y - np.float32(look.frequency * sin) * x
    pattern = PATTERNS[look.pattern](along + np.float32(look.phase), across)
    share = np.clip(np.float32(0.5) + np.float32(1.5) * pattern, 0, 1)
    # Shading along the pattern's direction leaves no surface that looks the same when turned;
    # the dark rim keeps an object visible on a background of its own colour.
    shade = np.float32(0.85) + np.float32(0.22 / look.frequency) * along
    shade *= np.clip(np.float32(0.35) - distance * np.float32(5), np.float32(0.35), 1)
    first = np.asarray(look.colour, np.float32)
    second = np.asarray(look.second_colour, np.float32)
    return (first + share[..., None] * (second - first)) * shade[..., None]
