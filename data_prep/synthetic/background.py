"""Textured backgrounds that pan and zoom slowly behind the objects."""

import numpy as np
from numpy.typing import NDArray

from data_prep.synthetic.scene import Camera

Array = NDArray[np.floating]

# The texture spans 2 picture sides: half a side to each side for panning and zooming out.
_SPAN = 2.0
# Cells of noise per texture side, from clouds to grain, and how much each weighs.
_OCTAVES = ((5, 1.0), (11, 0.6), (23, 0.4), (47, 0.25))


def render_background(camera: Camera, *, seed: int, contrast: float, size: int) -> Array:
    """Background of every frame, RGB from 0 to 1, float32 [T, size, size, 3].

    Args:
        camera: Pan, zoom and shake, one value per frame.
        seed: What the texture is drawn from.
        contrast: Strength of the texture, 0 to 1.
        size: Picture side in pixels.
    """
    texture_HWC = _texture(np.random.default_rng(seed), contrast, round(size * _SPAN))
    side = texture_HWC.shape[0]
    centred = (np.arange(size) + 0.5) / size - 0.5
    canvas_THWC = np.empty((len(camera.zoom), size, size, 3), np.float32)
    for frame, zoom in enumerate(camera.zoom):
        at_x = (centred - camera.shake_x[frame]) * zoom + camera.pan_x[frame]
        at_y = (centred - camera.shake_y[frame]) * zoom + camera.pan_y[frame]
        rows = _resample(texture_HWC, at_y * size + side / 2 - 0.5)
        columns = _resample(rows.transpose(1, 0, 2), at_x * size + side / 2 - 0.5)
        canvas_THWC[frame] = columns.transpose(1, 0, 2)
    return canvas_THWC


def _texture(rng: np.random.Generator, contrast: float, side: int) -> Array:
    """Clouds of three colours around a random mean, [side, side, 3]."""
    fields = _noise(rng, side)
    colours = rng.uniform(-1, 1, size=(2, 3)).astype(np.float32)
    mean = rng.uniform(0.3, 0.6, size=3).astype(np.float32)
    # Not a matrix product: a BLAS may sum differently with another number of threads.
    clouds = fields[..., :1] * colours[0] + fields[..., 1:] * colours[1]
    return mean + np.float32(0.3 * contrast) * clouds


def _noise(rng: np.random.Generator, side: int) -> Array:
    """Two independent fields of value noise, about −1 to 1, [side, side, 2]."""
    total = np.zeros((side, side, 2), np.float32)
    for cells, weight in _OCTAVES:
        lattice = rng.uniform(-1, 1, size=(cells + 2, cells + 2, 2)).astype(np.float32)
        at = np.linspace(0, cells, side)
        rows = _resample(lattice, at)
        total += np.float32(weight) * _resample(rows.transpose(1, 0, 2), at)
    return total


def _resample(image_HWC: Array, at: NDArray[np.float64]) -> Array:
    """Rows of an image at fractional places, linear between neighbours, held at the border."""
    last = image_HWC.shape[0] - 1
    at = np.clip(at, 0, last - 1e-4)
    low = at.astype(np.int64)
    share = (at - low).astype(np.float32)[:, None, None]
    return image_HWC[low] * (1 - share) + image_HWC[low + 1] * share
