"""The two multi-block masks of V-JEPA 2, as pure functions of (seed, position).

The algorithm is the reference's (arXiv 2506.09985 and its released code): the blocks of one mask
share one size in the whole micro-batch, every clip places them on its own, everything they cover
is the target, the rest is the context, and both are cut to the shortest of the micro-batch by
keeping the lowest token indices. Only the randomness differs: the reference draws from counters
and worker-global generators, so its masks change with the number of workers and after a resume.
"""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator

from pipeline.clip import Grid, MaskSet
from pipeline.config.section import Section
from pipeline.errors import ConfigError

# Keep draws made for different purposes apart when seed, position and mask index are equal.
_SIZE_STREAM = 1
_PLACE_STREAM = 2

# Blocks that leave a context once in a hundred draws still fail here only once in 10^4 clips;
# the reference would redraw for ever.
_MAX_REDRAWS = 1000


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


def sample_masks(
    configs: Sequence[BlockMask], grid: Grid, seed: int, positions: Sequence[int]
) -> tuple[MaskSet, ...]:
    """Draw every mask for the clips of one micro-batch.

    The size of a mask's blocks depends on (seed, first position, mask index), the places of a
    clip's blocks on (seed, its position, mask index); so the same micro-batch has the same masks
    at any world size, worker count and number of restarts.

    Args:
        configs: The masks, in the order in which they are returned.
        grid: Tokens of a clip along time, height and width.
        seed: The run's seed, not negative.
        positions: Global positions of the micro-batch's clips.

    Returns:
        One `MaskSet` per mask; int64 indices, ascending, context and target disjoint.

    Raises:
        ConfigError: The blocks leave no context or cover no token on this grid.
    """
    return tuple(
        _sample_mask(config, grid, seed, positions, index) for index, config in enumerate(configs)
    )


def block_size(config: BlockMask, grid: Grid, seed: int) -> tuple[int, int, int]:
    """Size (t, h, w) in tokens of one mask's blocks.

    Three uniforms, always drawn in this order from a torch CPU generator seeded with `seed`:
    temporal scale, spatial scale, aspect ratio. Height or width can come out as 0 on a grid too
    small for the scale; `sample_masks` and `check_masks` refuse that.
    """
    generator = torch.Generator().manual_seed(seed)
    temporal, spatial, aspect = (torch.rand(1, generator=generator).item() for _ in range(3))
    return _size(
        grid,
        temporal=_between(config.temporal_scale, temporal),
        spatial=_between(config.spatial_scale, spatial),
        aspect=_between(config.aspect_ratio, aspect),
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
                    _check_size(config, grid, size, index)


def _sample_mask(
    config: BlockMask, grid: Grid, seed: int, positions: Sequence[int], index: int
) -> MaskSet:
    size_seed = np.random.SeedSequence((_SIZE_STREAM, seed, index, positions[0]))
    # A torch seed is a signed 64-bit number; the CPU generator uses its lower 32 bits.
    size = block_size(config, grid, int(size_seed.generate_state(1, np.uint32)[0]))
    _check_size(config, grid, size, index)
    contexts: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for position in positions:
        places = np.random.Philox(np.random.SeedSequence((_PLACE_STREAM, seed, index, position)))
        is_context_N = _draw_clip(config, grid, size, places, index)
        contexts.append(np.flatnonzero(is_context_N))
        targets.append(np.flatnonzero(~is_context_N))
    return MaskSet(context_BK=_stack_shortest(contexts), target_BK=_stack_shortest(targets))


def _draw_clip(
    config: BlockMask,
    grid: Grid,
    size: tuple[int, int, int],
    places: np.random.Philox,
    index: int,
) -> np.ndarray:
    """Context of one clip, bool [N]; redrawn while it is empty."""
    t, h, w = size
    # Order of the draws per block, as in the reference: top, left, start.
    choices = np.array((grid.h - h + 1, grid.w - w + 1, grid.t - t + 1))
    first_target_step = max(1, int(grid.t * config.max_temporal_keep))
    for _ in range(_MAX_REDRAWS):
        is_context = np.ones((grid.t, grid.h, grid.w), dtype=bool)
        for top, left, start in _draw_places(places, config.num_blocks, choices):
            is_context[start : start + t, top : top + h, left : left + w] = False
        is_context[first_target_step:] = False
        if is_context.any():
            return is_context.ravel()
    raise ConfigError(
        f"mask {index}: {config.num_blocks} blocks of {t}×{h}×{w} tokens left no context in "
        f"{_MAX_REDRAWS} draws on a grid of {_text(grid)} tokens (time × height × width)",
        remedy="Lower num_blocks or spatial_scale of this mask, or raise the stage's resolution.",
    )


def _draw_places(places: np.random.Philox, num_blocks: int, choices: np.ndarray) -> np.ndarray:
    """Corners of blocks, int [num_blocks, 3], each uniform in 0 … choices − 1.

    Built from Philox's raw numbers, which numpy keeps stable between versions; the methods of
    its Generator are not, and a resumed run must see the same masks.
    """
    raw = places.random_raw(num_blocks * 3).reshape(num_blocks, 3)
    unit = (raw >> np.uint64(11)) * 2.0**-53
    return (unit * choices).astype(np.int64)


def _stack_shortest(indices: list[np.ndarray]) -> torch.Tensor:
    """Keep the lowest indices of every clip, as many as the shortest has; int64 [B, K]."""
    shortest = min(len(clip) for clip in indices)
    return torch.from_numpy(np.stack([clip[:shortest] for clip in indices]))


def _size(grid: Grid, *, temporal: float, spatial: float, aspect: float) -> tuple[int, int, int]:
    num_tokens = int(grid.h * grid.w * spatial)
    return (
        max(1, int(grid.t * temporal)),
        min(grid.h, round(math.sqrt(num_tokens * aspect))),
        min(grid.w, round(math.sqrt(num_tokens / aspect))),
    )


def _check_size(config: BlockMask, grid: Grid, size: tuple[int, int, int], index: int) -> None:
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
