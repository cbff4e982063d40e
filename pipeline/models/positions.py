"""Fixed sine and cosine tables of token positions, which V-JEPA 1 adds to its tokens."""

from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from pipeline.clip import Grid
from pipeline.errors import ConfigError
from pipeline.models.rope import token_positions

_BASE = 10000.0


def sincos_positions(index: Tensor, grid: Grid, width: int, *, uniform_power: bool) -> Tensor:
    """What is added to tokens so that they know their place.

    Time, height and width each have a part [sines | cosines] of the vector, in this order. With
    `uniform_power` the parts are equal, of the least even width whose triple covers the vector,
    and what stands over is cut off; else time has half of it. The table is that of the clip's
    own grid: another size of clip gets its own, not a stretched one.

    Args:
        index: Token indices in the clip's full grid, of any shape.
        grid: The clip's real grid.
        width: Width of a token.
        uniform_power: Equal parts for time, height and width.

    Returns:
        float32 [*index.shape, width].

    Raises:
        ConfigError: A token cannot be cut into such parts.
    """
    return _grid_table(grid, width, uniform_power, index.device)[index]


@lru_cache(maxsize=8)
def _grid_table(grid: Grid, width: int, uniform_power: bool, device: torch.device) -> Tensor:
    dims = (2 * ceil(width / 6),) * 3 if uniform_power else (width // 2, width // 4, width // 4)
    # A tensor made in inference mode could never be kept for a backward pass.
    with torch.inference_mode(mode=False), torch.no_grad():
        places = token_positions(torch.arange(grid.num_tokens, device=device), grid)
        parts = [_axis(place_N, dim) for place_N, dim in zip(places, dims, strict=True)]
        table_ND = torch.cat(parts, dim=-1)[:, :width].float()
    if table_ND.shape[-1] < width:
        raise ConfigError(
            f"expected a token's width to be a multiple of 8 for sincos positions, got {width}",
            remedy="Change the width, or set attention.uniform_power=true.",
        )
    return table_ND


def _axis(place_N: Tensor, dim: int) -> Tensor:
    # float64, like the reference's table.
    j = torch.arange(dim // 2, dtype=torch.float64, device=place_N.device)
    angle = place_N.double()[:, None] * _BASE ** (-j / (dim / 2))
    return torch.cat((angle.sin(), angle.cos()), dim=-1)
