"""The masks of a micro-batch, as pure functions of (seed, position), under three rules.

`min` is the reference's rule (arXiv 2506.09985 and its released code): the blocks of one mask
share one size in the whole micro-batch, every clip places them on its own, and contexts and
targets are cut to the shortest of the micro-batch by keeping the lowest token indices. Indices
run along time first, so what is cut is the end of clips, and how much depends on the size of the
micro-batch. Only the randomness differs: the reference draws from counters and worker-global
generators, so its masks change with the number of workers and after a resume.

`fixed` and `none` draw size and places of the blocks for every clip alone: the same position has
the same mask in any micro-batch. `fixed` drops tokens at random, whatever their time, down to
constant lengths; a draw that has fewer is followed by the next. `none` drops nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.clip import Grid, MaskSet
from pipeline.masks.blocks import (
    MAX_REDRAWS,
    BlockMask,
    MaskConfig,
    block_size,
    check_size,
    draw_context,
    no_context,
    place_blocks,
    size_of_units,
    uniforms,
)
from pipeline.masks.fixed import FixedLengths, fixed_lengths

# Keep draws made for different purposes apart when seed, position and mask index are equal.
_SIZE_STREAM = 1
_PLACE_STREAM = 2
_CLIP_STREAM = 3

_NOTHING_LEFT_OUT = FixedLengths(context=1, target=1)


def sample_masks(
    masks: MaskConfig, grid: Grid, seed: int, positions: Sequence[int]
) -> tuple[MaskSet, ...]:
    """Draw every mask for the clips of one micro-batch.

    The same micro-batch has the same masks at any world size, worker count and number of
    restarts. With the rule `min` the size of a mask's blocks depends on (seed, first position,
    mask index) and what is cut on the whole micro-batch; with the others everything depends on
    (seed, a clip's own position, mask index).

    Args:
        masks: The masks, in the order in which they are returned, and their rule.
        grid: Tokens of a clip along time, height and width.
        seed: The run's seed, not negative.
        positions: Global positions of the micro-batch's clips.

    Returns:
        One `MaskSet` per mask; int64 indices, ascending, context and target disjoint.

    Raises:
        ConfigError: The blocks leave no context or cover no token on this grid.
    """
    sample = _cut_to_shortest if masks.truncate == "min" else _each_for_itself
    return tuple(
        sample(masks, number, grid, [_Draw(seed, number, position) for position in positions])
        for number in range(len(masks.blocks))
    )


class _Draw:
    """The random numbers of one mask of one clip."""

    def __init__(self, seed: int, index: int, position: int) -> None:
        self._key = (seed, index, position)

    def numbers(self, stream: int) -> np.random.Philox:
        return np.random.Philox(np.random.SeedSequence((stream, *self._key)))

    def size_seed(self) -> int:
        # A torch seed is a signed 64-bit number; the CPU generator uses its lower 32 bits.
        sequence = np.random.SeedSequence((_SIZE_STREAM, *self._key))
        return int(sequence.generate_state(1, np.uint32)[0])


def _cut_to_shortest(masks: MaskConfig, index: int, grid: Grid, draws: Sequence[_Draw]) -> MaskSet:
    config = masks.blocks[index]
    size = block_size(config, grid, draws[0].size_seed())
    check_size(config, grid, size, index)
    contexts: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for draw in draws:
        is_context_N = draw_context(config, grid, size, draw.numbers(_PLACE_STREAM), index)
        contexts.append(np.flatnonzero(is_context_N))
        targets.append(np.flatnonzero(~is_context_N))
    return MaskSet(context_BK=_stack_shortest(contexts), target_BK=_stack_shortest(targets))


def _stack_shortest(indices: list[np.ndarray]) -> torch.Tensor:
    """Keep the lowest indices of every clip, as many as the shortest has; int64 [B, K]."""
    shortest = min(len(clip) for clip in indices)
    return torch.from_numpy(np.stack([clip[:shortest] for clip in indices]))


def _each_for_itself(masks: MaskConfig, index: int, grid: Grid, draws: Sequence[_Draw]) -> MaskSet:
    config, drops = masks.blocks[index], masks.truncate == "fixed"
    # Sections are frozen and so can be hashed, which pyright does not see.
    lengths = fixed_lengths(config, grid) if drops else _NOTHING_LEFT_OUT  # pyright: ignore[reportArgumentType]
    contexts: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for draw in draws:
        numbers = draw.numbers(_CLIP_STREAM)
        is_context_N = _draw_with(config, grid, lengths, numbers, index)
        context, target = np.flatnonzero(is_context_N), np.flatnonzero(~is_context_N)
        if drops:
            context = _drop_at_random(context, lengths.context, numbers)
            target = _drop_at_random(target, lengths.target, numbers)
        contexts.append(context)
        targets.append(target)
    return MaskSet(
        context_BK=_pad(contexts),
        target_BK=_pad(targets),
        context_lengths=_lengths(contexts),
        target_lengths=_lengths(targets),
    )


def _draw_with(
    config: BlockMask, grid: Grid, wanted: FixedLengths, numbers: np.random.Philox, index: int
) -> np.ndarray:
    """Context of one clip, bool [N], after the first draw that has as many tokens as wanted."""
    for _ in range(MAX_REDRAWS):
        size = size_of_units(config, grid, uniforms(numbers, 3).tolist())
        check_size(config, grid, size, index)
        is_context = place_blocks(config, grid, size, numbers)
        if wanted.context <= int(is_context.sum()) <= grid.num_tokens - wanted.target:
            return is_context.ravel()
    raise no_context(config, grid, size_of_units(config, grid, (0.5, 0.5, 0.5)), index)


def _drop_at_random(tokens: np.ndarray, length: int, numbers: np.random.Philox) -> np.ndarray:
    """A random choice of `length` tokens, ascending."""
    if len(tokens) == length:
        return tokens
    lots = numbers.random_raw(len(tokens))
    return np.sort(tokens[np.argpartition(lots, length)[:length]])


def _pad(indices: list[np.ndarray]) -> torch.Tensor:
    padded = np.zeros((len(indices), max(len(clip) for clip in indices)), dtype=np.int64)
    for row, clip in zip(padded, indices, strict=True):
        row[: len(clip)] = clip
    return torch.from_numpy(padded)


def _lengths(indices: list[np.ndarray]) -> tuple[int, ...] | None:
    lengths = tuple(len(clip) for clip in indices)
    return None if len(set(lengths)) == 1 else lengths
