"""Masks agree with the reference's algorithm and are functions of (seed, position) alone."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.clip import Grid, MaskSet
from pipeline.errors import ConfigError
from pipeline.masks.blocks import (
    REFERENCE_MASKS,
    BlockMask,
    MaskConfig,
    block_size,
    check_masks,
)
from pipeline.masks.sample import sample_masks

torch.set_num_threads(1)

GRID = Grid(t=8, h=16, w=16)
SHORT, LONG = REFERENCE_MASKS
MASKS = MaskConfig(truncate="min")


@pytest.mark.parametrize(
    ("config", "side", "expected"),
    [
        (SHORT, 16, [(6, 7), (6, 6), (7, 6), (6, 6), (6, 7), (7, 5)]),
        (LONG, 16, [(12, 15), (14, 13), (15, 12), (13, 14), (12, 15), (16, 11)]),
        (SHORT, 24, [(8, 10), (10, 9), (10, 8), (9, 9), (8, 10), (11, 8)]),
        (LONG, 24, [(18, 22), (21, 20), (22, 18), (20, 20), (18, 22), (24, 17)]),
    ],
)
def test_block_sizes_equal_the_reference_for_seeds_0_to_5(config, side, expected):
    grid = Grid(t=8, h=side, w=side)
    assert [block_size(config, grid, seed) for seed in range(6)] == [(8, h, w) for h, w in expected]


def test_mean_numbers_of_tokens_equal_those_measured_on_the_reference_sampler():
    # Published means of 1,500 micro-batches of 24 clips at 16 frames, 256 pixels. With 400 the
    # standard error is 4 tokens (short range) and 2 to 3 (long range): the tolerances are 4 sigma.
    widths = np.array(
        [
            [(m.context_BK.shape[1], m.target_BK.shape[1]) for m in _draw(seed=1, number=number)]
            for number in range(400)
        ]
    )
    mean = widths.mean(axis=0)
    assert mean[0] == pytest.approx([497, 974], abs=20)
    assert mean[1] == pytest.approx([128, 1439], abs=12)
    # Outermost values of the 1,500, widened by one row of a block over all eight time steps.
    assert widths[:, 0, 0].min() >= 176 - 56
    assert widths[:, 0, 0].max() <= 696 + 56
    assert widths[:, 1, 1].min() >= 1344 - 120
    assert widths[:, 1, 1].max() <= 1568 + 120


def test_context_fraction_before_truncation_equals_the_reference():
    # A micro-batch of one clip is not truncated.
    single = [sample_masks(MASKS, GRID, 0, [position]) for position in range(600)]
    share = [np.mean([m[k].context_BK.shape[1] / 2048 for m in single]) for k in (0, 1)]
    # Published 0.380 and 0.190; standard error of 600 clips 0.004, tolerance 4 sigma.
    assert share == pytest.approx([0.380, 0.190], abs=0.016)


@settings(max_examples=60, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 6), st.integers(3, 12), st.integers(3, 12)),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 2**45),
    num_clips=st.integers(1, 5),
)
def test_context_and_target_are_disjoint_ascending_and_never_empty(sides, seed, first, num_clips):
    grid = Grid(t=sides[0], h=sides[1], w=sides[2])
    for mask in sample_masks(MASKS, grid, seed, range(first, first + num_clips)):
        for indices in (mask.context_BK, mask.target_BK):
            assert indices.shape[0] == num_clips
            assert indices.shape[1] >= 1
            assert indices.dtype == torch.int64
            assert (indices.diff(dim=1) > 0).all()
            assert 0 <= int(indices.min()) <= int(indices.max()) < grid.num_tokens
        for context, target in zip(mask.context_BK, mask.target_BK, strict=True):
            assert not set(context.tolist()) & set(target.tolist())


def test_truncation_keeps_the_lowest_indices_of_each_clip():
    # Same first position, so the same block size: the clips' own places give the full sets.
    batch = sample_masks(MaskConfig(truncate="min", blocks=(LONG,)), GRID, 5, range(40, 52))[0]
    full = [_full_context(LONG, seed=5, first=40, position=p) for p in range(40, 52)]
    shortest = min(len(context) for context in full)
    assert batch.context_BK.tolist() == [context[:shortest] for context in full]
    assert {len(context) for context in full} != {shortest}


def test_tubes_cover_the_same_places_in_every_time_step():
    mask = sample_masks(MaskConfig(truncate="min", blocks=(SHORT,)), GRID, 3, [77])[0]
    is_context = torch.zeros(GRID.num_tokens, dtype=torch.bool)
    is_context[mask.context_BK[0]] = True
    is_context_TN = is_context.view(GRID.t, -1)
    assert (is_context_TN == is_context_TN[:1]).all()


def test_masks_depend_on_seed_position_and_mask_index_and_nothing_else():
    first = _draw(seed=7, number=3)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the point is that global state has no influence
    _draw(seed=8, number=1)
    assert _same(first, _draw(seed=7, number=3))
    assert not _same(first, _draw(seed=8, number=3))
    assert not _same(first, _draw(seed=7, number=4))
    twins = sample_masks(MaskConfig(truncate="min", blocks=(SHORT, SHORT)), GRID, 7, range(8))
    assert not _same(twins[:1], twins[1:])


def test_masks_of_a_fixed_seed_never_change():
    # A resume by a later version has to draw what this one drew.
    mask = sample_masks(
        MaskConfig(truncate="min", blocks=(SHORT,)), Grid(t=2, h=4, w=4), 239, [0, 1]
    )[0]
    assert mask.context_BK.tolist() == [
        [0, 1, 2, 3, 4, 5, 11, 12, 16, 17, 18, 19],
        [0, 4, 8, 9, 14, 15, 16, 20, 24, 25, 30, 31],
    ]
    assert mask.target_BK[0].tolist() == [
        *(6, 7, 8, 9, 10, 13, 14, 15),
        *(22, 23, 24, 25, 26, 29, 30, 31),
    ]


def test_neighbouring_seeds_positions_and_masks_place_their_blocks_independently():
    # Eight blocks on 16×16 tokens: two equal patterns would be no accident.
    patterns = [
        mask.context_BK[0].tolist()
        for seed, position in itertools.product(range(6), range(6))
        for mask in sample_masks(
            MaskConfig(truncate="min", blocks=(SHORT, SHORT)), GRID, seed, [position]
        )
    ]
    assert len({tuple(pattern) for pattern in patterns}) == len(patterns)


def test_block_corners_are_uniform_over_all_places_inclusive():
    config = BlockMask(num_blocks=1, spatial_scale=(0.25, 0.25), aspect_ratio=(1.0, 1.0))
    grid = Grid(t=1, h=4, w=4)
    counts = np.zeros((3, 3))
    for position in range(1800):
        target = sample_masks(MaskConfig(truncate="min", blocks=(config,)), grid, 0, [position])[
            0
        ].target_BK[0]
        counts[int(target[0]) // 4, int(target[0]) % 4] += 1
    # 9 corners, 200 expected each; sigma is 13.3, so 4 sigma.
    assert counts == pytest.approx(200, abs=54)


def test_time_after_max_temporal_keep_is_never_context():
    config = BlockMask(num_blocks=2, spatial_scale=(0.3, 0.3), max_temporal_keep=0.5)
    mask = sample_masks(MaskConfig(truncate="min", blocks=(config,)), GRID, 0, range(6))[0]
    assert int(mask.context_BK.max()) < 4 * 256
    last_half = torch.arange(4 * 256, 8 * 256)
    single = sample_masks(MaskConfig(truncate="min", blocks=(config,)), GRID, 0, [0])[0]
    assert torch.isin(last_half, single.target_BK[0]).all()


def test_partial_blocks_in_time_start_anywhere_and_stay_inside():
    config = BlockMask(num_blocks=1, spatial_scale=(0.2, 0.2), temporal_scale=(0.5, 0.5))
    starts = set()
    for position in range(60):
        target = sample_masks(MaskConfig(truncate="min", blocks=(config,)), GRID, 0, [position])[
            0
        ].target_BK[0]
        steps = (target // 256).unique()
        assert len(steps) == 4
        starts.add(int(steps[0]))
    assert starts == {0, 1, 2, 3, 4}


def test_a_clip_without_context_is_drawn_again():
    # Two blocks of 3×4 tokens on 4×4 cover everything in half of all draws.
    config = BlockMask(num_blocks=2, spatial_scale=(0.7, 0.7), aspect_ratio=(0.75, 0.75))
    mask = sample_masks(
        MaskConfig(truncate="min", blocks=(config,)), Grid(t=2, h=4, w=4), 0, range(64)
    )[0]
    assert mask.context_BK.shape == (64, 8)


@pytest.mark.parametrize(
    ("config", "side", "message"),
    [
        (
            BlockMask(num_blocks=1, spatial_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0)),
            8,
            "cover the whole grid of 2×8×8",
        ),
        (BlockMask(num_blocks=8, spatial_scale=(0.15, 0.15)), 2, "smaller than one token"),
        (BlockMask(num_blocks=400, spatial_scale=(0.7, 0.7)), 4, "left no context in 1000 draws"),
    ],
)
def test_impossible_masks_are_named_with_the_grid_and_a_remedy(config, side, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sample_masks(
            MaskConfig(truncate="min", blocks=(config,)), Grid(t=2, h=side, w=side), 0, range(4)
        )
    assert "mask 0" in str(caught.value)
    assert "spatial_scale" in caught.value.remedy


def test_check_masks_finds_a_size_that_only_some_draws_reach():
    sometimes_all = BlockMask(num_blocks=1, spatial_scale=(0.5, 1.0), aspect_ratio=(1.0, 1.0))
    with pytest.raises(ConfigError, match="mask 1: one block"):
        check_masks([SHORT, sometimes_all], Grid(t=4, h=4, w=4))
    for side in (3, 4, 6, 8, 16, 24):
        check_masks(REFERENCE_MASKS, Grid(t=8, h=side, w=side))


@pytest.mark.parametrize(
    "values",
    [
        {"num_blocks": 0, "spatial_scale": (0.1, 0.1)},
        {"num_blocks": 1, "spatial_scale": (0.3, 0.1)},
        {"num_blocks": 1, "spatial_scale": (0.0, 0.1)},
        {"num_blocks": 1, "spatial_scale": (0.5, 1.1)},
        {"num_blocks": 1, "spatial_scale": ("0.1", 0.1)},
        {"num_blocks": 1, "spatial_scale": (0.1, 0.1), "max_keep": 5},
    ],
)
def test_wrong_mask_sections_are_refused(values):
    with pytest.raises(ValidationError):
        BlockMask(**values)


def _draw(*, seed: int, number: int, num_clips: int = 24) -> tuple[MaskSet, ...]:
    first = number * num_clips
    return sample_masks(MASKS, GRID, seed, range(first, first + num_clips))


def _same(one: tuple[MaskSet, ...], other: tuple[MaskSet, ...]) -> bool:
    return all(
        torch.equal(a.context_BK, b.context_BK) and torch.equal(a.target_BK, b.target_BK)
        for a, b in zip(one, other, strict=True)
    )


def _full_context(config: BlockMask, *, seed: int, first: int, position: int) -> list[int]:
    """Context of one clip before truncation, in a micro-batch that begins at `first`.

    The blocks are tubes, and truncation never reaches the first time step, so what the target
    covers there is what it covers everywhere.
    """
    pair = sample_masks(
        MaskConfig(truncate="min", blocks=(config,)), GRID, seed, [first, position]
    )[0]
    covered = {index for index in pair.target_BK[1].tolist() if index < 256}
    return [index for index in range(GRID.num_tokens) if index % 256 not in covered]
