"""Rotary positions: the reference's vector, and what tells the two layouts apart."""

import math

import pytest
import torch

from pipeline.clip import Grid
from pipeline.errors import ConfigError
from pipeline.models import rope
from pipeline.models.positions import sincos_positions
from pipeline.models.rope import (
    RotaryStyle,
    axis_dim,
    rotary_angles,
    rotary_factors,
    rotary_tables,
    rotate,
    token_positions,
    turn_projected,
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


# What bf16 autocast makes of the frequencies of 20 and 10 elements, and of angles at two places.
AUTOCAST_A20 = [
    1, 0.3984375, 0.158203125, 0.0625, 0.0250244141, 0.0100097656, 0.00393676758, 0.00159454346,
    0.000625610352, 0.000255584717,
]  # fmt: skip
AUTOCAST_A10 = [1, 0.158203125, 0.0250244141, 0.00393676758, 0.000625610352]
AUTOCAST_ANGLES = {
    15: [15, 5.96875, 2.375, 0.9375, 0.375, 0.1503906],
    23: [23, 9.1875, 3.640625, 1.4375, 0.5742188, 0.2304688],
}


@pytest.mark.parametrize(("dim", "expected"), [(20, AUTOCAST_A20), (10, AUTOCAST_A10)])
def test_frequencies_under_autocast_are_rounded_as_the_references(dim, expected):
    angles = rotary_angles(torch.tensor([1]), dim, "tiled", "reference-autocast")[0]
    assert angles.dtype == torch.bfloat16
    torch.testing.assert_close(
        angles[: dim // 2].float(), torch.tensor(expected), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("position", AUTOCAST_ANGLES)
def test_angles_under_autocast_are_rounded_as_the_references(position):
    angles = rotary_angles(torch.tensor([position]), 20, "tiled", "reference-autocast")[0]
    expected = torch.tensor(AUTOCAST_ANGLES[position])
    torch.testing.assert_close(angles[:6].float(), expected, rtol=1e-6, atol=0)


def test_rotation_under_autocast_rounds_each_product_to_bfloat16():
    x = torch.randn(64, generator=torch.Generator().manual_seed(4)).bfloat16()
    style = RotaryStyle(precision="reference-autocast")
    tables = rotary_tables(torch.tensor([[300]]), GRID, 64, style)
    angles = rotary_angles(torch.tensor([12]), 20, "tiled", "reference-autocast")[0]
    part = x[40:60]
    swapped = torch.stack((-part[1::2], part[0::2]), dim=-1).flatten()
    expected = part * angles.cos() + swapped * angles.sin()
    assert torch.equal(rotate(x.view(1, 1, 1, 64), tables).flatten()[40:60], expected)


@pytest.mark.parametrize("edge", [8, 16, 24])
def test_rescaled_positions_spread_any_size_over_16_places_and_leave_time(edge):
    style = RotaryStyle(mode="interleaved", rescale=True)
    grid = Grid(t=4, h=edge, w=edge)
    last = torch.tensor([grid.num_tokens - 1])
    found = rotary_tables(last, grid, 60, style).flatten(1)
    expected = [rotary_factors(rotary_angles(torch.tensor([p]), 20, "interleaved"))[:, 0]
                for p in (3, 15, 15)]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(expected, dim=-1), atol=1e-6, rtol=0)


def test_rescaling_leaves_the_trained_size_and_a_single_row_as_they_are():
    for grid in (GRID, Grid(t=2, h=1, w=16)):
        index = torch.arange(grid.num_tokens)
        plain = rotary_tables(index, grid, 64, RotaryStyle())
        assert torch.equal(rotary_tables(index, grid, 64, RotaryStyle(rescale=True)), plain)


def test_tables_of_a_grid_are_computed_once(monkeypatch):
    calls = []
    grid = Grid(t=5, h=7, w=3)
    monkeypatch.setattr(rope, "rotary_angles", lambda *a: calls.append(a) or rotary_angles(*a))
    for index in (torch.tensor([1, 2]), torch.tensor([[3], [104]])):
        rotary_tables(index, grid, 64, RotaryStyle())
    assert len(calls) == 3
    rotary_tables(torch.tensor([1]), grid, 64, RotaryStyle(mode="interleaved"))
    assert len(calls) == 6


def test_tables_first_made_in_inference_mode_can_be_used_in_training():
    grid, x = Grid(t=3, h=5, w=2), torch.randn(1, 1, 64, requires_grad=True)
    with torch.inference_mode():
        rotary_tables(torch.tensor([1]), grid, 64, RotaryStyle())
    rotate(x, rotary_tables(torch.tensor([1]), grid, 64, RotaryStyle())).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("uniform", "dims"), [(True, (22, 22, 22)), (False, (32, 16, 16))])
def test_sincos_positions_have_a_part_of_sines_and_cosines_for_each_axis(uniform, dims):
    """Width 64; with uniform power three parts of 22, of which the last loses two cosines."""
    found = sincos_positions(torch.tensor([300]), GRID, 64, uniform_power=uniform)[0]
    expected = []
    for place, dim in zip((1, 2, 12), dims, strict=True):
        angles = [place / 10000 ** (2 * j / dim) for j in range(dim // 2)]
        expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    torch.testing.assert_close(found, torch.tensor(expected[:64]), atol=1e-6, rtol=0)


def test_sincos_positions_of_a_width_without_whole_parts_are_refused():
    with pytest.raises(ConfigError, match="multiple of 8"):
        sincos_positions(torch.tensor([0]), GRID, 60, uniform_power=False)


@pytest.mark.parametrize("mode", ["tiled", "interleaved"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_gradients_of_a_turned_projection_are_those_of_its_formula(mode, dtype, tolerance):
    grid, (tokens, heads, head_dim) = Grid(t=3, h=4, w=5), (7, 2, 40)
    index = torch.randint(grid.num_tokens, (2, tokens))
    tables = rotary_tables(index, grid, head_dim, RotaryStyle(mode=mode))
    qkv = torch.randn(2, tokens, 3, heads, head_dim, dtype=dtype, requires_grad=True)
    weights = [torch.randn(2, tokens, heads, head_dim, dtype=dtype) for _ in range(3)]
    query, key, value = qkv.unbind(-3)
    expected = (rotate(query, tables), rotate(key, tables), value)
    found = turn_projected(qkv, tables)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    (by_expected,) = torch.autograd.grad(expected, qkv, weights)
    (by_found,) = torch.autograd.grad(found, qkv, weights)
    assert by_found.dtype == dtype
    torch.testing.assert_close(by_found, by_expected, rtol=tolerance, atol=tolerance)
