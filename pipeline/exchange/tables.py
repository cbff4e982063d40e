"""What the position tables in official checkpoints are, and what clips they were made for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.clip import Grid
from pipeline.models.positions import sincos_positions

# Tables are float64 sines rounded to float32.
_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFacts:
    """A table of sines and cosines, and how it was made."""

    grid: Grid
    uniform_power: bool


def read_table(table: Tensor) -> TableFacts | None:
    """How a position table [1, N, D] was made; None if it is no table of sines and cosines.

    The clip was square: the sine of the width's first frequency is zero at the first token of
    every row and nowhere else, which tells the length of a row.
    """
    if table.dim() != 3 or len(table) != 1:
        return None
    table_ND = table[0].float()
    num_tokens, width = table_ND.shape
    for uniform_power in (True, False):
        start = 4 * -(-width // 6) if uniform_power else width // 2 + width // 4
        edge = _first_zero(table_ND[:, start])
        if edge is None or num_tokens % edge**2:
            continue
        grid = Grid(t=num_tokens // edge**2, h=edge, w=edge)
        if not uniform_power and width % 8:
            continue
        wanted_ND = sincos_positions(
            torch.arange(num_tokens), grid, width, uniform_power=uniform_power
        )
        if torch.allclose(table_ND, wanted_ND, atol=_TOLERANCE, rtol=0.0):
            return TableFacts(grid=grid, uniform_power=uniform_power)
    return None


def _first_zero(sine_N: Tensor) -> int | None:
    zeros = (sine_N[1:].abs() < _TOLERANCE).nonzero()
    return 1 + int(zeros[0]) if len(zeros) else None
