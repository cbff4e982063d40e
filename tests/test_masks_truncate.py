"""What each rule keeps of masks, and what it depends on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clip import Grid, MaskSet
from pipeline.config.load import load_config
from pipeline.masks.blocks import REFERENCE_MASKS, MaskConfig, StageMasks
from pipeline.masks.fixed import fixed_lengths
from pipeline.masks.kept import expected_kept
from pipeline.masks.sample import sample_masks
from pipeline.run import RunConfig

torch.set_num_threads(1)

GRID = Grid(t=8, h=16, w=16)
MIN, FIXED, NONE = (MaskConfig(truncate=rule) for rule in ("min", "fixed", "none"))


def test_kept_tokens_by_time_equal_those_measured_on_the_reference_sampler():
    # Published for 24 clips of 16 frames and 256 pixels. Standard errors of 128 micro-batches are
    # 1.5 tokens at most for the short-range mask and 1.2 for the long-range one.
    short, long = expected_kept(MIN, GRID, 24)
    assert short.context_T == pytest.approx([99, 99, 99, 92, 66, 34, 13, 5], abs=6)
    assert long.context_T == pytest.approx([48, 39, 22, 12, 5, 2.5, 1.8, 1.7], abs=5)
    assert short.context_T[-1] < 0.1 * short.context_T[0]


@pytest.mark.parametrize("masks", [FIXED, NONE])
def test_fixed_and_none_keep_as_much_of_every_time(masks):
    for kept in expected_kept(masks, GRID, 24, num_micro_batches=32):
        for by_time in (kept.context_T, kept.target_T):
            assert by_time == pytest.approx([sum(by_time) / GRID.t] * GRID.t, rel=0.03)


def test_none_keeps_every_token_of_every_clip():
    for mask in sample_masks(NONE, GRID, 5, range(24)):
        for context, target in _rows(mask):
            assert sorted(context + target) == list(range(GRID.num_tokens))
        assert mask.context_lengths is not None
        assert len(set(mask.context_lengths)) > 1
        assert mask.context_BK.shape[1] == max(mask.context_lengths)
        places = torch.arange(mask.context_BK.shape[1])
        assert not mask.context_BK[places >= torch.tensor(mask.context_lengths)[:, None]].any()


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from(["fixed", "none"]),
    sides=st.tuples(st.integers(1, 4), st.integers(3, 9), st.integers(3, 9)),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 2**45),
    micro_batch=st.integers(1, 5),
)
def test_a_position_has_the_same_mask_in_any_micro_batch(rule, sides, seed, first, micro_batch):
    grid, masks = Grid(t=sides[0], h=sides[1], w=sides[2]), MaskConfig(truncate=rule)
    together = sample_masks(masks, grid, seed, range(first, first + micro_batch))
    for offset in range(micro_batch):
        alone = sample_masks(masks, grid, seed, [first + offset])
        for one, many in zip(alone, together, strict=True):
            assert _rows(one)[0] == _rows(many)[offset]
            context, target = _rows(one)[0]
            assert not set(context) & set(target)
            assert context == sorted(set(context))
            assert target == sorted(set(target))
            assert context
            assert target


def test_min_depends_on_the_micro_batch_as_in_the_reference():
    small, large = (expected_kept(MIN, GRID, b, num_micro_batches=32)[0].context for b in (2, 24))
    assert small > 1.2 * large


def test_fixed_lengths_are_constants_of_mask_and_grid_for_every_seed_and_position():
    for number, config in enumerate(REFERENCE_MASKS):
        lengths = fixed_lengths(config, GRID)
        for seed, first in ((0, 0), (7, 1000)):
            mask = sample_masks(FIXED, GRID, seed, range(first, first + 6))[number]
            assert mask.context_BK.shape == (6, lengths.context)
            assert mask.target_BK.shape == (6, lengths.target)
            assert mask.context_lengths is None
            assert mask.target_lengths is None


def test_fixed_lengths_never_change():
    # A resume by a later version has to keep what this one keeps.
    lengths = [fixed_lengths(config, GRID) for config in REFERENCE_MASKS]
    assert [(one.context, one.target) for one in lengths] == [(584, 1072), (192, 1456)]


def test_eight_draws_in_ten_are_taken_at_once_and_then_fixed_is_a_choice_of_nones_tokens():
    positions = range(300)
    for fixed, none in zip(
        sample_masks(FIXED, GRID, 3, positions), sample_masks(NONE, GRID, 3, positions), strict=True
    ):
        inside = [
            set(few[0]) <= set(all_of_them[0]) and set(few[1]) <= set(all_of_them[1])
            for few, all_of_them in zip(_rows(fixed), _rows(none), strict=True)
        ]
        # Standard error 2.3 %.
        assert np.mean(inside) == pytest.approx(0.8, abs=0.09)


def test_masks_of_fixed_and_none_never_change():
    grid = Grid(t=2, h=4, w=4)
    fixed, none = (sample_masks(masks, grid, 239, [0])[0] for masks in (FIXED, NONE))
    assert fixed.context_BK.tolist() == [[3, 4, 5, 18, 19, 22, 28, 29]]
    assert none.context_BK.tolist() == [
        [0, 2, 3, 4, 5, 6, 10, 12, 13, 16, 18, 19, 20, 21, 22, 26, 28, 29]
    ]


def test_stages_may_have_their_own_rule_or_their_own_masks():
    own = StageMasks(truncate="fixed").over(MIN)
    assert (own.truncate, own.blocks) == ("fixed", REFERENCE_MASKS)
    own = StageMasks(blocks=REFERENCE_MASKS[:1]).over(FIXED)
    assert (own.truncate, own.blocks) == ("fixed", REFERENCE_MASKS[:1])


def test_the_rule_is_one_key_of_a_run_and_a_list_of_masks_means_the_default_rule():
    tiny = Path("pipeline/configs/tiny-cpu.yaml")
    words = ("masks.truncate=none", "stages.1.masks.truncate=fixed")
    config = load_config(tiny, RunConfig, words).config
    assert [config.masks_of(stage).truncate for stage in config.stages] == ["none", "fixed", "none"]
    assert config.masks.blocks == REFERENCE_MASKS
    listed = MaskConfig.model_validate([{"num_blocks": 2, "spatial_scale": [0.7, 0.7]}])
    assert (listed.truncate, listed.blocks) == ("fixed", REFERENCE_MASKS[1:])


def test_kept_tells_lengths_of_every_clip():
    mask = sample_masks(NONE, GRID, 5, range(4))[0]
    assert mask.kept() == tuple((len(context), len(target)) for context, target in _rows(mask))
    mask = sample_masks(MIN, GRID, 5, range(4))[0]
    assert mask.kept() == ((mask.context_BK.shape[1], mask.target_BK.shape[1]),) * 4


def _rows(mask: MaskSet) -> list[tuple[list[int], list[int]]]:
    pairs = zip(mask.context_BK.tolist(), mask.target_BK.tolist(), mask.kept(), strict=True)
    return [(context[:num], target[:count]) for context, target, (num, count) in pairs]
