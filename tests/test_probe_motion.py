"""What the benchmark on motion says of scores: direction told from answers, and what holds."""

import pytest

from benchmarks.motion import direction_share, score_row, verdict
from data_prep.synthetic.classes import PAIRS, bare

NAMES = [bare(words) for pair in PAIRS[:2] for words in (pair.forward, pair.backward)]


def _record(step, right, reversed_, elsewhere=0):
    """A head that puts clips of the first class into it, into its reverse, and into another."""
    confusion = [(0, 0, right), (0, 1, reversed_), (0, 2, elsewhere)]
    top1 = right / (right + reversed_ + elsewhere)
    return {"step": step, "class_names": NAMES, "confusion": confusion, "top1": top1}


def _scores(**records):
    return [
        score_row(order, encoder, records[order])
        for order in ("forward", "shuffled")
        for encoder in ("untrained", "trained")
    ]


def test_direction_counts_the_clips_of_a_pair_and_no_others():
    assert direction_share(_record(0, 30, 10, elsewhere=60)) == 0.75
    assert direction_share(_record(0, 0, 0, elsewhere=5)) == 0.0


def test_an_advantage_in_order_that_shuffling_takes_holds():
    forward = [_record(0, 50, 50, 20), _record(0, 52, 48, 20), _record(9, 80, 20, 20)]
    shuffled = [_record(0, 50, 50, 20), _record(9, 49, 51, 20), _record(9, 52, 48, 20)]
    found = verdict(_scores(forward=forward, shuffled=shuffled))
    assert all(found["holds"].values())
    assert found["advantage"][0]["top1_least_gap"] == pytest.approx(100 * 28 / 120, abs=0.1)


def test_stills_overlapping_spreads_and_directions_left_by_shuffling_do_not_hold():
    overlapping = [_record(0, 50, 50), _record(0, 70, 30), _record(9, 65, 35), _record(9, 80, 20)]
    found = verdict(_scores(forward=overlapping, shuffled=overlapping))["holds"]
    assert not found["trained_above_untrained_outside_the_spread"]
    assert not found["direction_at_chance_when_shuffled"]
    assert not found["shuffling_takes_the_advantage"]
    assert found["direction_above_chance_in_order"]


def test_the_interval_counts_clips_once_however_many_seeds_answer():
    once = score_row("forward", "trained", [_record(9, 60, 40)])
    often = score_row("forward", "trained", [_record(9, 60, 40)] * 6)
    assert often["direction_interval"] == once["direction_interval"]
    assert often["num_scores"] == 6
