"""Means over the tokens of masks, and the context loss of V-JEPA 2.1 (arXiv 2603.14482)."""

import torch
from pydantic import Field
from torch import Tensor

from pipeline.clip import Grid
from pipeline.config.section import Section
from pipeline.models.packing import PackedTokens, sequence_of_token

# The patches along an edge of 256 pixels, on which the distances of V-JEPA 2.1 are counted.
_BASE_EDGE = 16


class ContextLoss(Section):
    """The loss at tokens that the student sees, weaker the further they are from what is hidden."""

    weight: float = Field(default=0.5, gt=0.0)
    """Weight beside the loss at targets once it has risen; 0.5 for video in V-JEPA 2.1."""
    start_step: int = Field(default=15_000, ge=0)
    """Step of the run up to which the weight is 0."""
    full_step: int = Field(default=30_000, ge=0)
    """Step of the run from which on the weight is full; it rises on a line in between."""
    scale_distance: bool = False
    """Count distances in sixteenths of a frame's height rather than in patches, so that larger
    frames weigh the same; from 512 pixels on, where a frame has 32 patches."""

    def at(self, step: int) -> float:
        """Weight at a 1-based step of the run: 0, then a line, then full."""
        if step >= self.full_step:
            return self.weight
        risen = (step - self.start_step) / (self.full_step - self.start_step)
        return self.weight * max(0.0, risen)


def mean_per_mask(value_P: Tensor, tokens: PackedTokens) -> list[Tensor]:
    """For each mask the mean over clips of each clip's mean over its tokens."""
    lengths = tokens.packing.lengths
    per_mask = value_P.split(tokens.per_mask)
    num_clips = len(lengths) // len(per_mask)
    clips = [lengths[n * num_clips : (n + 1) * num_clips] for n in range(len(per_mask))]
    if all(len(set(each)) == 1 for each in clips):
        return [value.mean() for value in per_mask]
    length_P = tokens.packing.offsets.diff()[sequence_of_token(tokens.packing)]
    return [value.sum() / num_clips for value in (value_P / length_P).split(tokens.per_mask)]


def inverse_root_distance(
    context: PackedTokens, target: PackedTokens, grid: Grid, *, scale: bool
) -> Tensor:
    """1/sqrt(d) of every context token [P], d the distance to the nearest target of its mask.

    With `scale` distances are divided by the grid's height over 16, rounded down.
    """
    squared_SN = squared_distances(target, grid)
    distance_P = squared_SN[sequence_of_token(context.packing), context.index_P].sqrt()
    if scale:
        distance_P = distance_P / max(1, grid.h // _BASE_EDGE)
    return distance_P.rsqrt()


def squared_distances(target: PackedTokens, grid: Grid) -> Tensor:
    """Squared Euclidean distance [S, N] of every token to the nearest target of its sequence.

    In token units along time, height and width. The nearest target is found along one axis after
    the other: min over t', h', w' of a sum of squares is a minimum of minima, so the cost is
    N · (t + h + w) instead of contexts · targets. Exact, since all numbers are small integers.
    """
    num_sequences = len(target.packing.lengths)
    far = float(grid.t**2 + grid.h**2 + grid.w**2)
    squared = torch.full((num_sequences, grid.num_tokens), far, device=target.index_P.device)
    squared[sequence_of_token(target.packing), target.index_P] = 0.0
    cube = squared.view(-1, grid.t, grid.h, grid.w)
    for axis in (1, 2, 3):
        cube = _nearest_along(cube, axis)
    return cube.flatten(1)


def _nearest_along(squared: Tensor, axis: int) -> Tensor:
    """Minimum over y of squared[y] + (x − y)², for every x along an axis."""
    place = torch.arange(squared.shape[axis], device=squared.device, dtype=squared.dtype)
    steps_XY = (place[:, None] - place) ** 2
    last = squared.movedim(axis, -1)
    return (last.unsqueeze(-2) + steps_XY).amin(dim=-1).movedim(-1, axis)
