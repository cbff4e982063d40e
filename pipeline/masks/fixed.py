"""How many tokens the rule `fixed` keeps: constants of a mask and a grid."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.clip import Grid
from pipeline.masks.blocks import BlockMask, place_blocks, size_of_units, uniforms

# One draw in ten has too little context and one in ten too few targets; those are drawn again.
# Less would throw more tokens away, more would narrow the choice of masks.
_TOO_SHORT = 0.1
_NUM_DRAWS = 1000
# Apart from every stream that masks of a run are drawn from.
_STREAM = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedLengths:
    """Tokens that every clip keeps of one mask."""

    context: int
    target: int


@lru_cache(maxsize=64)
def fixed_lengths(config: BlockMask, grid: Grid) -> FixedLengths:
    """Lengths that nine draws in ten reach, in context and in target, before any token is dropped.

    They are quantiles of 1,000 draws from a stream of their own, so they depend on nothing but
    the mask and the grid: not on seed, micro-batch or machine.
    """
    numbers = np.random.Philox(np.random.SeedSequence(_STREAM))
    sizes = [size_of_units(config, grid, uniforms(numbers, 3).tolist()) for _ in range(_NUM_DRAWS)]
    drawn = (int(place_blocks(config, grid, size, numbers).sum()) for size in sizes)
    # A draw without context is never used, whatever the rule.
    contexts = sorted(count for count in drawn if count)
    if not contexts:
        return FixedLengths(context=1, target=1)
    # What is not context is target: the shortest targets stand where the contexts are longest.
    place = int(_TOO_SHORT * len(contexts))
    longest = contexts[len(contexts) - 1 - place]
    return FixedLengths(context=contexts[place], target=max(1, grid.num_tokens - longest))
