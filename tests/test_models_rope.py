"""Rotary positions: the reference's vector, and what tells the two layouts apart."""

import math

import pytest
import torch

from pipeline.clip import Grid
from pipeline.models.rope import (
    RotaryStyle,
    axis_dim,
    rotary_angles,
    rotary_factors,
    rotary_tables,
    rotate,
    token_positions,
)

# V-JEPA 2's tiled layout, axis dim 20, position 3, x_i = i/10, in float32.
TILED_A20_P3 = [
    -0.014112, 0.036764, 0.040489, 0.332273, 0.361222, 0.511773, 0.591597, 0.702845, 0.798295,
    0.900603, -1.145225, 1.334375, 0.471813, 1.502571, 1.283099, 1.541319, 1.579583, 1.707588,
    1.796400, 1.901356,
]  # fmt: skip
GRID = Grid(t=8, h=16, w=16)


def turn(x, position, mode):
    """One axis vector turned to `position`."""
    angles = rotary_angles(torch.tensor([position]), x.shape[-1], mode)[0]
    return rotate(x, rotary_factors(angles))


def test_tiled_rotation_matches_the_reference_vector():
    turned = turn(torch.arange(20) / 10, 3, "tiled")
    torch.testing.assert_close(turned, torch.tensor(TILED_A20_P3), atol=1e-6, rtol=0)


def test_token_300_of_a_16_by_16_grid_stands_at_1_2_12():
    t, h, w = token_positions(torch.tensor([300]), GRID)
    assert (t.item(), h.item(), w.item()) == (1, 2, 12)


def test_positions_of_a_grid_that_is_not_square_invert_the_token_order():
    grid = Grid(t=3, h=2, w=5)
    t, h, w = token_positions(torch.arange(grid.num_tokens), grid)
    assert torch.equal((t * grid.h + h) * grid.w + w, torch.arange(30))
    assert (t.max(), h.max(), w.max()) == (2, 1, 4)


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [(12, 4), (32, 10), (64, 20), (80, 26), (88, 28), (104, 34)],
)
def test_axis_dims_are_those_of_the_reference(head_dim, expected):
    assert axis_dim(head_dim) == expected


@pytest.mark.parametrize("dim", [10, 20, 26])
def test_interleaved_keeps_the_length_of_every_pair_and_tiled_does_not(dim):
    x = torch.randn(dim, generator=torch.Generator().manual_seed(0))
    before = x.unflatten(-1, (-1, 2)).norm(dim=-1)
    after = {
        mode: turn(x, 5, mode).unflatten(-1, (-1, 2)).norm(dim=-1)
        for mode in ("tiled", "interleaved")
    }
    torch.testing.assert_close(after["interleaved"], before, atol=1e-6, rtol=1e-6)
    assert (after["tiled"] - before).abs().max() > 0.05


def test_interleaved_scores_depend_on_the_distance_alone_and_tiled_scores_do_not():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 20, generator=generator)

    def score(mode, at):
        return (turn(query, at, mode) @ turn(key, at + 4, mode)).item()

    assert score("interleaved", 9) == pytest.approx(score("interleaved", 0), abs=1e-5)
    assert abs(score("tiled", 9) - score("tiled", 0)) > 0.05


@pytest.mark.parametrize("mode", ["tiled", "interleaved"])
def test_tables_turn_each_axis_by_its_own_position_and_leave_the_tail(mode):
    x = torch.randn(64, generator=torch.Generator().manual_seed(2))
    tables = rotary_tables(torch.tensor([[300]]), GRID, 64, RotaryStyle(mode=mode))
    turned = rotate(x.view(1, 1, 1, 64), tables).flatten()
    parts = [turn(x[a : a + 20], p, mode) for a, p in ((0, 1), (20, 2), (40, 12))]
    torch.testing.assert_close(turned, torch.cat([*parts, x[60:]]), atol=1e-6, rtol=0)
    assert torch.equal(turned[60:], x[60:])


def test_bfloat16_vectors_are_turned_by_float32_angles():
    # In bfloat16 the angle itself would be wrong by up to 0.03 rad here.
    x = torch.randn(60, generator=torch.Generator().manual_seed(3)).bfloat16()
    tables = rotary_tables(
        torch.tensor([[31 * 256 + 23]]), Grid(t=32, h=16, w=16), 60, RotaryStyle()
    )
    turned = rotate(x.view(1, 1, 1, 60), tables)
    assert tables.dtype == torch.float32
    assert turned.dtype == torch.bfloat16
    exact = rotate(x.float().view(1, 1, 1, 60), tables)
    assert torch.equal(turned, exact.bfloat16())


def test_frequencies_are_those_of_the_reference():
    frequencies = rotary_angles(torch.tensor([1]), 20, "tiled")[0]
    expected = torch.tensor([10000.0 ** (-j / 10) for j in range(10)])
    torch.testing.assert_close(frequencies[:10], expected, rtol=1e-6, atol=0)
    assert torch.equal(frequencies[:10], frequencies[10:])
    assert math.isclose(frequencies[5].item(), 0.0099999998, rel_tol=1e-6)
