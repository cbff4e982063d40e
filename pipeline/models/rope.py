"""Rotary position embedding of token indices along time, height and width.

A head vector is cut as [t | h | w | tail]; the three axis parts have equal, even length and the
tail is not rotated. `tiled` is what V-JEPA 2 was trained with: the angle vector of an axis is its
frequencies twice in a row, while pairs are adjacent elements, so the two members of a pair turn by
different angles. `interleaved` (V-JEPA 2.1) repeats each frequency for both members, which makes
it a true rotation.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.clip import Grid

RopeMode = Literal["tiled", "interleaved"]
RopePrecision = Literal["fp32", "reference-autocast"]

MIN_HEAD_DIM = 12
"""Below this an axis would have fewer than four rotated elements, a single frequency."""

_BASE = 10000.0
# The patches along an edge of 256 pixels, which V-JEPA 2.1 maps every size onto.
_TRAINED_EDGE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryStyle:
    """Everything about rotary positions that is not the clip's grid; see `AttentionConfig`."""

    mode: RopeMode = "tiled"
    precision: RopePrecision = "fp32"
    rescale: bool = False


def axis_dim(head_dim: int) -> int:
    """Rotated elements of a head vector per axis: the largest even number with three in a head."""
    return 2 * (head_dim // 3 // 2)


def rotary_angles(
    position_P: Tensor, dim: int, mode: RopeMode, precision: RopePrecision = "fp32"
) -> Tensor:
    """Angles of one axis in radians [P, dim] for positions [P].

    Frequencies are 10000^(-j/m) with m = dim/2 and j = 0..m-1. In `fp32` everything is float32.
    `reference-autocast` rounds as the reference does under bf16 autocast: exponents, frequencies,
    positions and angles are bfloat16, the power alone is float32; the angle is then wrong by up
    to 0.03 rad at position 31.
    """
    num_frequencies = dim // 2
    j = torch.arange(num_frequencies, dtype=torch.float32, device=position_P.device)
    exponent = j / num_frequencies
    position = position_P.float()
    if precision == "reference-autocast":
        frequency = (1.0 / _BASE ** exponent.bfloat16().float()).bfloat16()
        position = position.bfloat16()
    else:
        frequency = _BASE**-exponent
    frequency = frequency.repeat(2) if mode == "tiled" else frequency.repeat_interleave(2)
    return position[:, None] * frequency


def token_positions(index: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Time, height and width positions of token indices, each in `index`'s shape."""
    return (
        index.div(grid.h * grid.w, rounding_mode="floor"),
        index.remainder(grid.h * grid.w).div(grid.w, rounding_mode="floor"),
        index.remainder(grid.w),
    )


def rotary_tables(index: Tensor, grid: Grid, head_dim: int, style: RotaryStyle) -> Tensor:
    """What turns the tokens of a forward pass, shared by all its layers.

    Angles, cosines and sines are computed once per grid and kept; a call only picks its tokens.

    Args:
        index: Token indices in the clip's full grid, of any shape.
        grid: The clip's real grid.
        head_dim: Width of one attention head.
        style: Layout, precision and scale of the angles.

    Returns:
        [2, *index.shape, 1, head_dim] for `rotate`, float32 or bfloat16 as the style says; the
        tail is left as it is. One tensor, because the hooks of ZeRO-3 look for tensors among a
        module's arguments.
    """
    return _grid_table(grid, head_dim, style, index.device)[:, index]


def forget_tables() -> None:
    """Empties what `rotary_tables` keeps; for measuring what keeping saves."""
    _grid_table.cache_clear()


@lru_cache(maxsize=8)
def _grid_table(grid: Grid, head_dim: int, style: RotaryStyle, device: torch.device) -> Tensor:
    """Factors [2, N, 1, head_dim] of all tokens of a grid; some 9 MiB for 64 frames of 384 px."""
    dim = axis_dim(head_dim)
    # A tensor made in inference mode could never be kept for a backward pass.
    with torch.inference_mode(mode=False), torch.no_grad():
        places = token_positions(torch.arange(grid.num_tokens, device=device), grid)
        axes = (
            (places[0], grid.t, 1.0),
            (places[1], grid.h, _scale(grid.h, style)),
            (places[2], grid.w, _scale(grid.w, style)),
        )
        parts = []
        for place_N, length, scale in axes:
            position_P = torch.arange(length, dtype=torch.float32, device=device) * scale
            angles = rotary_angles(position_P, dim, style.mode, style.precision)
            parts.append(rotary_factors(angles)[:, place_N])
        tail = parts[0].new_zeros(2, grid.num_tokens, head_dim - 3 * dim)
        tail[0] = 1.0
        return torch.cat([*parts, tail], dim=-1).unsqueeze(-2)


def _scale(length: int, style: RotaryStyle) -> float:
    """What a place along an edge of `length` patches is multiplied by (arXiv 2603.14482)."""
    return (_TRAINED_EDGE - 1) / (length - 1) if style.rescale and length > 1 else 1.0


def rotary_factors(angle: Tensor) -> Tensor:
    """Cosines and sines of angles [..., dim], stacked; each pair's first sine is negated."""
    sin = angle.sin()
    sin[..., 0::2].neg_()
    return torch.stack((angle.cos(), sin))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Head vectors [..., head_dim] turned by `rotary` [2, ..., head_dim], cast back.

    x · cos + (x with its pairs swapped) · signed sin. Rotation is bound by memory traffic, so no
    term gets a float32 copy of its own: the cast is left to type promotion, the sign to the table.
    """
    cos, sin = rotary.unbind()
    swapped = _swap(x)
    if rotary.dtype == torch.bfloat16:
        # Each product is rounded, as in the reference; a fused one would round but once.
        return (x * cos + swapped * sin).to(x.dtype)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def turn_projected(qkv: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [..., heads, head_dim] of a fused projection, the first two turned.

    Args:
        qkv: [..., 3, heads, head_dim].
        rotary: As for `rotate`, for [..., heads, head_dim].
    """
    if rotary.dtype != torch.bfloat16 and not torch.compiler.is_compiling():
        return _TurnProjected.apply(qkv, rotary)  # pyright: ignore[reportReturnType]
    query_key, value = qkv.split((2, 1), dim=-3)
    query, key = rotate(query_key, rotary.unsqueeze(-3)).unbind(-3)
    return query, key, value.squeeze(-3)


class _TurnProjected(torch.autograd.Function):
    """As above, with gradients written straight into that of the projection.

    Left to itself, backward copies them twice more, to stack what was split; a compiler sees to
    that by itself.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rotary)
        query, key = rotate(qkv[..., :2, :, :], rotary.unsqueeze(-3)).unbind(-3)
        return query, key, qkv.select(-3, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_part: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rotary,) = ctx.saved_tensors
        cos, sin = rotary.unbind()
        # The transpose of x · cos + swap(x) · sin is g · cos + swap(g · sin).
        sin = _swap(sin)
        query, key, value = by_part
        shape = (*value.shape[:-2], 3, *value.shape[-2:])
        by_qkv = value.new_empty(shape)
        for number, part in enumerate((query, key)):
            torch.addcmul(part * cos, _swap(part), sin, out=by_qkv.select(-3, number))
        by_qkv.select(-3, 2).copy_(value)
        return by_qkv, None


def _swap(x: Tensor) -> Tensor:
    """The members of every pair of adjacent elements exchanged."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
