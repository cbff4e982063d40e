"""Decoded frames to the clip a network sees; the only file that imports torchvision.

Pictures stay uint8 until they are on the device: a quarter of the bytes travel between processes
and over the bus, and torchvision resizes uint8 in channels-last order several times faster than
floats. Random numbers are Philox keyed by (seed, position), so a clip's crop is the same at any
world size, worker count and after any restart.
"""

import math
import sys
import threading
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from pipeline.data.order import Purpose, random_units

_NUM_TRIES = 10
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Lives as long as the process: torch drops the schemas with the object that declared them.
_missing_schemas: torch.library.Library | None = None
_IMPORTING = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class CropBox:
    """One crop of a whole clip, in pixels of the stored picture."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    @property
    def rows_and_columns(self) -> tuple[slice, slice]:
        """Where the box lies, to cut it out of an array [H, W, …]."""
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)

    @property
    def inside(self) -> "CropBox":
        """The same box, seen from a picture that was cut to it."""
        return replace(self, top=0, left=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CropSpec:
    """How boxes are drawn: share of the area, width / height, and how often mirrored."""

    scale: tuple[float, float]
    aspect_ratio: tuple[float, float]
    horizontal_flip: float


def random_box(spec: CropSpec, *, height: int, width: int, seed: int, position: int) -> CropBox:
    """The random resized crop of a clip (the reference's, arXiv 2506.09985 §A).

    Ten tries of an area uniform in `scale` and a log-uniform ratio; then the largest centred box
    of an allowed ratio.

    Args:
        spec: Limits of the draw.
        height: Height of the stored picture.
        width: Width of the stored picture.
        seed: The run's seed.
        position: Global position of the clip.
    """
    units = random_units(seed, position, Purpose.CROP, 3 + 2 * _NUM_TRIES).tolist()
    flip_unit, top_unit, left_unit, *tries = units
    for area_unit, ratio_unit in zip(tries[::2], tries[1::2], strict=True):
        box_height, box_width = _box_size(spec, height * width, area_unit, ratio_unit)
        if 0 < box_height <= height and 0 < box_width <= width:
            break
    else:
        box_height, box_width = _largest_size(spec, height, width)
        top_unit = left_unit = 0.5
    return CropBox(
        top=int(top_unit * (height - box_height + 1)),
        left=int(left_unit * (width - box_width + 1)),
        height=box_height,
        width=box_width,
        flip=flip_unit < spec.horizontal_flip,
    )


def crop(frames_THWC: np.ndarray, box: CropBox, resolution: int, *, antialias: bool) -> Tensor:
    """Cut `box` out of every frame and resize it, bilinear.

    Frames that were cut to a box while they were decoded are given with `box.inside`.

    The reference resizes floats without antialiasing; on uint8 the result differs from it by
    less than one level of 255, without bias.

    Args:
        frames_THWC: uint8 RGB frames, contiguous as they come from the decoder.
        box: Where to cut, and whether to mirror left and right.
        resolution: Height and width of the result.
        antialias: Low-pass before shrinking; smoother than the reference and a little slower.

    Returns:
        uint8 [C, T, resolution, resolution].
    """
    # A view: torchvision is three times faster on this order than on a contiguous NCHW copy.
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
    cut_TCHW = transforms().resized_crop(
        frames_TCHW,
        top=box.top,
        left=box.left,
        height=box.height,
        width=box.width,
        size=[resolution, resolution],
        antialias=antialias,
    )
    if box.flip:
        cut_TCHW = transforms().horizontal_flip(cut_TCHW)
    return cut_TCHW.transpose(0, 1)


def normalise(video: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [..., C, T, H, W] to floats with ImageNet's mean and deviation, on its device."""
    mean, scale = _imagenet_constants(video.device)
    return video.to(torch.float32).sub_(mean).mul_(scale).to(dtype)


@cache
def _imagenet_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept: copying them to a GPU again in every step would make the host wait for it.
    mean = torch.tensor(IMAGENET_MEAN, device=device).mul_(255).view(3, 1, 1, 1)
    scale = torch.tensor(IMAGENET_STD, device=device).mul_(255).reciprocal_().view(3, 1, 1, 1)
    return mean, scale


def evaluation_views(frames_THWC: np.ndarray, resolution: int, num_views: int = 1) -> list[Tensor]:
    """The crops on which a frozen encoder is scored.

    One view is the centre square after the short side is resized to resolution · 256 / 224;
    several are squares of the full short side, evenly spread along the long side from edge to
    edge (the reference's evaluation takes three).

    Args:
        frames_THWC: uint8 RGB frames.
        resolution: Height and width of a view.
        num_views: Number of views, at least 1.

    Returns:
        `num_views` tensors, uint8 [C, T, resolution, resolution].
    """
    short_side = int(resolution * 256 / 224) if num_views == 1 else resolution
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
    resized_TCHW = transforms().resize(frames_TCHW, [short_side], antialias=True)
    if num_views == 1:
        return [transforms().center_crop(resized_TCHW, [resolution, resolution]).transpose(0, 1)]
    height, width = resized_TCHW.shape[-2:]
    views = []
    for number in range(num_views):
        top = round((height - resolution) * number / (num_views - 1))
        left = round((width - resolution) * number / (num_views - 1))
        view_TCHW = transforms().crop(resized_TCHW, top, left, resolution, resolution)
        views.append(view_TCHW.transpose(0, 1))
    return views


def _box_size(spec: CropSpec, area: int, area_unit: float, ratio_unit: float) -> tuple[int, int]:
    low, high = spec.scale
    box_area = area * (low + (high - low) * area_unit)
    log_low, log_high = math.log(spec.aspect_ratio[0]), math.log(spec.aspect_ratio[1])
    ratio = math.exp(log_low + (log_high - log_low) * ratio_unit)
    return round(math.sqrt(box_area / ratio)), round(math.sqrt(box_area * ratio))


def _largest_size(spec: CropSpec, height: int, width: int) -> tuple[int, int]:
    """Height and width of the largest box whose ratio is allowed."""
    low, high = spec.aspect_ratio
    if width / height < low:
        return max(1, min(height, round(width / low))), width
    if width / height > high:
        return height, max(1, min(width, round(height * high)))
    return height, width


def transforms() -> ModuleType:
    """`torchvision.transforms.v2.functional`, also where torchvision's compiled part is missing.

    The wheel is linked against CUDA. Beside a CPU-only torch its library is skipped silently, and
    the import then fails because it describes two operators that nobody declared
    (pytorch/vision#9085). Declaring them is enough; they are not used here. It is tried first
    without, since a second declaration beside a library that did load would clash.

    Imported at the first use: it costs a second, and a process with loader workers needs none.
    One thread imports and the others wait: half an import would be taken apart by the retry.
    """
    with _IMPORTING:
        return _transforms()


@cache
def _transforms() -> ModuleType:
    global _missing_schemas  # noqa: PLW0603 - one per process, like the registry it writes to
    try:
        from torchvision.transforms.v2 import functional  # noqa: PLC0415
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::nms" not in str(error):
            raise
        for name in [name for name in list(sys.modules) if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _missing_schemas = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _missing_schemas.define(schema)
        from torchvision.transforms.v2 import functional  # noqa: PLC0415
    return functional
