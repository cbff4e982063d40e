"""Multi-block masks: their settings, the size of their blocks and where those are placed.

What blocks cover is the target, the rest is the context (arXiv 2506.09985 and its released code).
How many tokens of either are used is up to `sample`.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from pipeline.clip import Grid
from pipeline.config.section import Section
from pipeline.errors import ConfigError

Truncate = Literal["min", "fixed", "none"]
BlockSize = tuple[int, int, int]

# Blocks that leave a context once in a hundred draws still fail here only once in 10^4 clips;
# the reference would redraw for ever.
MAX_REDRAWS = 1000


class BlockMask(Section):
    """One mask: how many blocks are cut out of a clip, and how large they are."""

    num_blocks: int = Field(ge=1)
    """How many blocks are placed in every clip; they may overlap."""
    spatial_scale: tuple[float, float] = Field(strict=False)
    """Smallest and largest share of a frame's area that one block covers, each in (0, 1]."""
    temporal_scale: tuple[float, float] = Field(default=(1.0, 1.0), strict=False)
    """Smallest and largest share of the clip's time one block covers; 1.0 makes tubes."""
    aspect_ratio: tuple[float, float] = Field(default=(0.75, 1.5), strict=False)
    """Smallest and largest height of a block divided by its width."""
    max_temporal_keep: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the clip, from its start, that may be context; below 1.0 the rest is target."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        for name in ("spatial_scale", "temporal_scale", "aspect_ratio"):
            low, high = getattr(self, name)
            largest = math.inf if name == "aspect_ratio" else 1.0
            if not 0.0 < low <= high <= largest:
                limits = "0 < low <= high" + ("" if math.isinf(largest) else " <= 1")
                raise ValueError(f"{name} must be [low, high] with {limits}, got [{low}, {high}]")
        return self


REFERENCE_MASKS: tuple[BlockMask, BlockMask] = (
    BlockMask(num_blocks=8, spatial_scale=(0.15, 0.15)),
    BlockMask(num_blocks=2, spatial_scale=(0.7, 0.7)),
)
"""The short-range and the long-range mask of every released V-JEPA 2 configuration."""


def _list_means_blocks(value: Any) -> Any:
    return {"blocks": value} if isinstance(value, list | tuple) else value


class MaskConfig(Section):
    """The masks of every clip; a bare list of masks means `blocks`."""

    truncate: Truncate = "fixed"
    """What happens to tokens so that the clips of a micro-batch keep equally many: `fixed` keeps a
    constant number for each mask and stage, dropped at random over the whole clip; `min` cuts all
    to the shortest of the micro-batch and keeps the earliest tokens (the reference's rule, which
    hides the end of clips and depends on micro_batch); `none` keeps all tokens."""
    blocks: tuple[BlockMask, ...] = Field(default=REFERENCE_MASKS, strict=False)
    """The masks, each of which is predicted on its own."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return _list_means_blocks(value)


class StageMasks(Section):
    """What a stage's masks have of their own; the rest is the run's."""

    truncate: Truncate | None = None
    """Rule of this stage; the run's if left out."""
    blocks: tuple[BlockMask, ...] | None = Field(default=None, strict=False)
    """Masks of this stage; the run's if left out."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return _list_means_blocks(value)

    def over(self, masks: MaskConfig) -> MaskConfig:
        """The run's masks with what this stage has of its own."""
        return MaskConfig(
            truncate=masks.truncate if self.truncate is None else self.truncate,
            blocks=masks.blocks if self.blocks is None else self.blocks,
        )


def block_size(config: BlockMask, grid: Grid, seed: int) -> BlockSize:
    """Size (t, h, w) in tokens of one mask's blocks, as the reference draws it from a seed.

    Three uniforms, always drawn in this order from a torch CPU generator seeded with `seed`:
    temporal scale, spatial scale, aspect ratio. Height or width can come out as 0 on a grid too
    small for the scale; `check_size` and `check_masks` refuse that.
    """
    generator = torch.Generator().manual_seed(seed)
    units = [torch.rand(1, generator=generator).item() for _ in range(3)]
    return size_of_units(config, grid, units)


def size_of_units(config: BlockMask, grid: Grid, units: Sequence[float]) -> BlockSize:
    """Size (t, h, w) from uniforms in [0, 1) for temporal scale, spatial scale, aspect ratio."""
    return _size(
        grid,
        temporal=_between(config.temporal_scale, units[0]),
        spatial=_between(config.spatial_scale, units[1]),
        aspect=_between(config.aspect_ratio, units[2]),
    )


def uniforms(numbers: np.random.Philox, count: int) -> np.ndarray:
    """Uniforms in [0, 1), float64.

    Built from Philox's raw numbers, which numpy keeps stable between versions; the methods of
    its Generator are not, and a resumed run must see the same masks.
    """
    return (numbers.random_raw(count) >> np.uint64(11)) * 2.0**-53


def place_blocks(
    config: BlockMask, grid: Grid, size: BlockSize, numbers: np.random.Philox
) -> np.ndarray:
    """Context of one clip after one draw of its blocks' places, bool [t, h, w]; may be empty."""
    t, h, w = size
    # Order of the draws per block, as in the reference: top, left, start.
    choices = np.array((grid.h - h + 1, grid.w - w + 1, grid.t - t + 1))
    corners = uniforms(numbers, config.num_blocks * 3).reshape(-1, 3) * choices
    is_context = np.ones((grid.t, grid.h, grid.w), dtype=bool)
    for top, left, start in corners.astype(np.int64).tolist():
        is_context[start : start + t, top : top + h, left : left + w] = False
    is_context[max(1, int(grid.t * config.max_temporal_keep)) :] = False
    return is_context


def draw_context(
    config: BlockMask, grid: Grid, size: BlockSize, numbers: np.random.Philox, index: int
) -> np.ndarray:
    """Context of one clip, bool [N]; drawn again while it is empty, as in the reference.

    Raises:
        ConfigError: It stays empty; `index` names the mask.
    """
    for _ in range(MAX_REDRAWS):
        is_context = place_blocks(config, grid, size, numbers)
        if is_context.any():
            return is_context.ravel()
    raise no_context(config, grid, size, index)


def no_context(config: BlockMask, grid: Grid, size: BlockSize, index: int) -> ConfigError:
    """What to say when no draw has given the tokens that are needed."""
    t, h, w = size
    return ConfigError(
        f"mask {index}: {config.num_blocks} blocks of {t}×{h}×{w} tokens left no context in "
        f"{MAX_REDRAWS} draws on a grid of {_text(grid)} tokens (time × height × width)",
        remedy="Lower num_blocks or spatial_scale of this mask, or raise the stage's resolution.",
    )


def check_masks(configs: Sequence[BlockMask], grid: Grid) -> None:
    """Refuse, before anything is trained, masks that can cover all or nothing of a grid.

    Raises:
        ConfigError: Some size the mask can draw covers no token or leaves no context.
    """
    for index, config in enumerate(configs):
        for unit in np.linspace(0.0, 1.0, 33):
            for temporal in config.temporal_scale:
                for spatial in config.spatial_scale:
                    aspect = _between(config.aspect_ratio, float(unit))
                    size = _size(grid, temporal=temporal, spatial=spatial, aspect=aspect)
                    check_size(config, grid, size, index)


def _size(grid: Grid, *, temporal: float, spatial: float, aspect: float) -> BlockSize:
    num_tokens = int(grid.h * grid.w * spatial)
    return (
        max(1, int(grid.t * temporal)),
        min(grid.h, round(math.sqrt(num_tokens * aspect))),
        min(grid.w, round(math.sqrt(num_tokens / aspect))),
    )


def check_size(config: BlockMask, grid: Grid, size: BlockSize, index: int) -> None:
    """Refuse a size that covers no token or leaves no context.

    Raises:
        ConfigError: It does; `index` names the mask.
    """
    if 0 in size:
        raise ConfigError(
            f"mask {index}: a block of spatial_scale {list(config.spatial_scale)} is smaller than "
            f"one token on a grid of {_text(grid)} tokens (time × height × width)",
            remedy="Raise spatial_scale of this mask, or the stage's resolution.",
        )
    if size == (grid.t, grid.h, grid.w):
        raise ConfigError(
            f"mask {index}: one block of spatial_scale {list(config.spatial_scale)} can cover the "
            f"whole grid of {_text(grid)} tokens (time × height × width) and leave no context",
            remedy="Lower spatial_scale of this mask, or raise the stage's resolution.",
        )


def _between(limits: tuple[float, float], unit: float) -> float:
    low, high = limits
    return low + unit * (high - low)


def _text(grid: Grid) -> str:
    return f"{grid.t}×{grid.h}×{grid.w}"
