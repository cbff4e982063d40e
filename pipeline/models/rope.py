"""Rotary position embedding of token indices along time, height and width.

A head vector is cut as [t | h | w | tail]; the three axis parts have equal, even length and the
tail is not rotated. `tiled` is what V-JEPA 2 was trained with: the angle vector of an axis is its
frequencies twice in a row, while pairs are adjacent elements, so the two members of a pair turn by
different angles. `interleaved` (V-JEPA 2.1) repeats each frequency for both members, which makes
it a true rotation.
"""

from typing import Literal

import torch
from torch import Tensor

from pipeline.clip import Grid

RopeMode = Literal["tiled", "interleaved"]

MIN_HEAD_DIM = 12
"""Below this an axis would have fewer than four rotated elements, a single frequency."""

_BASE = 10000.0


def axis_dim(head_dim: int) -> int:
    """Rotated elements of a head vector per axis: the largest even number with three in a head."""
    return 2 * (head_dim // 3 // 2)


def rotary_angles(position_P: Tensor, dim: int, mode: RopeMode) -> Tensor:
    """Angles of one axis in radians, float32 [P, dim], for whole-number positions [P].

    Frequencies are 10000^(-j/m) with m = dim/2 and j = 0..m-1; positions are neither offset nor
    scaled. Always float32: in bfloat16 the angle error at position 31 is already 0.03 rad.
    """
    num_frequencies = dim // 2
    j = torch.arange(num_frequencies, dtype=torch.float32, device=position_P.device)
    frequency = _BASE ** (-j / num_frequencies)
    frequency = frequency.repeat(2) if mode == "tiled" else frequency.repeat_interleave(2)
    return position_P.float()[:, None] * frequency


def token_positions(index: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Time, height and width positions of token indices, each in `index`'s shape."""
    return (
        index.div(grid.h * grid.w, rounding_mode="floor"),
        index.remainder(grid.h * grid.w).div(grid.w, rounding_mode="floor"),
        index.remainder(grid.w),
    )


def rotary_tables(index_BN: Tensor, grid: Grid, head_dim: int, mode: RopeMode) -> Tensor:
    """What turns the tokens of a forward pass, computed once and shared by all its layers.

    Args:
        index_BN: Token indices in the clip's full grid; B may be 1 if all clips share them.
        grid: The clip's real grid.
        head_dim: Width of one attention head.
        mode: How frequencies are laid out along an axis.

    Returns:
        float32 [2, B, N, 1, head_dim] for `rotate`; the tail is left as it is. One tensor,
        because the hooks of ZeRO-3 look for tensors among a module's arguments.
    """
    dim = axis_dim(head_dim)
    # Angles are taken once per position of the longest axis, then gathered: tokens are many,
    # positions few.
    positions = torch.arange(max(grid.t, grid.h, grid.w), device=index_BN.device)
    factors_RPA = rotary_factors(rotary_angles(positions, dim, mode))
    parts = [factors_RPA[:, position_BN] for position_BN in token_positions(index_BN, grid)]
    tail = torch.zeros(*parts[0].shape[:-1], head_dim - 3 * dim, device=index_BN.device)
    tail[0] = 1.0
    return torch.cat([*parts, tail], dim=-1).unsqueeze(-2)


def rotary_factors(angle: Tensor) -> Tensor:
    """Cosines and sines of angles [..., dim], stacked; each pair's first sine is negated."""
    sin = angle.sin()
    sin[..., 0::2].neg_()
    return torch.stack((angle.cos(), sin))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Head vectors [..., head_dim] turned by `rotary` [2, ..., head_dim], in float32, cast back.

    x · cos + (x with its pairs swapped) · signed sin. Rotation is bound by memory traffic, so no
    term gets a float32 copy of its own: the cast is left to type promotion, the sign to the table.
    """
    cos, sin = rotary
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
