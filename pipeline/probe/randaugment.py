"""RandAugment of a whole clip: the same few changes of colour and geometry in all its frames.

The recipe that V-JEPA 2's probes name `rand-m7-n4-mstd0.5-inc1` (arXiv 1909.13719 as widely used
since): operations are drawn with replacement, each is carried out with a probability, magnitudes of
0 to 10 vary by a normal deviation, and every operation is stronger the larger its magnitude.
Geometry is interpolated bilinearly where the reference takes bicubic: torchvision has no other on
tensors.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import transforms
from pipeline.probe.tasks import RandAugment

_MOST = 10.0
# What comes into the picture from outside of it.
_GREY = 128.0
_MOST_DEGREES = 30.0
_MOST_SHEAR = 0.3
_MOST_SHIFT = 0.45

Operation = Callable[[Tensor, float, float], Tensor]
"""uint8 [T, C, H, W], strength in [0, 1], sign → the same shape."""


def rand_augment(
    frames_THWC: np.ndarray, asked: RandAugment, generator: np.random.Generator
) -> np.ndarray:
    """Changed frames, uint8 [T, H, W, C].

    Args:
        frames_THWC: uint8 RGB frames.
        asked: How many operations, how strong, how often.
        generator: Every draw comes from it, so equal generators give equal clips.
    """
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
    # Drawn together, so that what one operation skips does not move the draws of the next.
    chosen = generator.integers(len(OPERATIONS), size=asked.operations)
    units = generator.random((asked.operations, 2))
    magnitudes = generator.normal(asked.magnitude, asked.deviation, asked.operations)
    names = list(OPERATIONS)
    for number, (unit, sign_unit), magnitude in zip(chosen, units, magnitudes, strict=True):
        if unit < asked.probability:
            strength = float(np.clip(magnitude, 0.0, _MOST)) / _MOST
            sign = -1.0 if sign_unit < 0.5 else 1.0
            frames_TCHW = OPERATIONS[names[number]](frames_TCHW, strength, sign)
    return np.ascontiguousarray(frames_TCHW.permute(0, 2, 3, 1).numpy())


def _factor(strength: float, sign: float) -> float:
    """Of colour, contrast, brightness, sharpness: 1 leaves a picture as it is."""
    return max(0.1, 1.0 + sign * 0.9 * strength)


def _add_to_dark(frames_TCHW: Tensor, strength: float, sign: float) -> Tensor:  # noqa: ARG001
    """Pixels of the darker half made brighter."""
    amount = min(128, int(110 * strength))
    brighter = frames_TCHW.to(torch.int16).add_(amount).clamp_(max=255).to(torch.uint8)
    return torch.where(frames_TCHW < 128, brighter, frames_TCHW)


def _solarized(frames_TCHW: Tensor, strength: float, sign: float) -> Tensor:  # noqa: ARG001
    """Pixels from a threshold on, which falls with the strength, inverted."""
    threshold = 256 - int(256 * strength)
    return frames_TCHW if threshold > 255 else transforms().solarize(frames_TCHW, threshold)


def _moved(
    frames_TCHW: Tensor,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Shifted by pixels, or sheared from the top left corner by so many pixels a pixel."""
    return transforms().affine(
        frames_TCHW,
        angle=0.0,
        translate=list(shift),
        scale=1.0,
        shear=[math.degrees(math.atan(part)) for part in shear],
        interpolation=_bilinear(),
        fill=[_GREY] * 3,
        center=[0.0, 0.0] if any(shear) else None,
    )


def _turned(frames_TCHW: Tensor, strength: float, sign: float) -> Tensor:
    degrees = sign * strength * _MOST_DEGREES
    return transforms().rotate(frames_TCHW, degrees, interpolation=_bilinear(), fill=[_GREY] * 3)


def _bilinear() -> object:
    return transforms().InterpolationMode.BILINEAR


def _called(name: str, frames_TCHW: Tensor, strength: float, sign: float) -> Tensor:  # noqa: ARG001
    return getattr(transforms(), name)(frames_TCHW)


def _adjusted(name: str, frames_TCHW: Tensor, strength: float, sign: float) -> Tensor:
    return getattr(transforms(), name)(frames_TCHW, _factor(strength, sign))


OPERATIONS: dict[str, Operation] = {
    "autocontrast": partial(_called, "autocontrast"),
    "equalize": partial(_called, "equalize"),
    "invert": partial(_called, "invert"),
    "rotate": _turned,
    "posterize": lambda x, strength, _: transforms().posterize(x, 4 - int(4 * strength)),
    "solarize": _solarized,
    "solarize-add": _add_to_dark,
    "colour": partial(_adjusted, "adjust_saturation"),
    "contrast": partial(_adjusted, "adjust_contrast"),
    "brightness": partial(_adjusted, "adjust_brightness"),
    "sharpness": partial(_adjusted, "adjust_sharpness"),
    "shear-x": lambda x, strength, sign: _moved(x, shear=(sign * _MOST_SHEAR * strength, 0.0)),
    "shear-y": lambda x, strength, sign: _moved(x, shear=(0.0, sign * _MOST_SHEAR * strength)),
    "shift-x": lambda x, strength, sign: _moved(
        x, shift=(sign * _MOST_SHIFT * strength * x.shape[-1], 0.0)
    ),
    "shift-y": lambda x, strength, sign: _moved(
        x, shift=(0.0, sign * _MOST_SHIFT * strength * x.shape[-2])
    ),
}
"""By name, in the order in which they are numbered; all stronger with magnitude, or without one."""
