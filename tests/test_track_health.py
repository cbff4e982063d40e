"""Signals of collapse against closed forms, and the verdict on made-up histories."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.objectives.jepa import Objective
from pipeline.track.collapse import LIMITS
from pipeline.track.health import HealthWatch, verdict
from pipeline.track.signals import collapse_signals, effective_rank, sigreg_gauge
from tests.test_track_metrics import REPORT

torch.set_num_threads(1)


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_the_gauge_of_exact_gaussians_has_its_closed_form():
    # √(2π)·erf(3/√2) − √(2π/3)·erf(3√1.5), over N; averaged, since it is an expectation.
    expected = math.sqrt(2 * math.pi) * math.erf(3 / math.sqrt(2)) - math.sqrt(
        2 * math.pi / 3
    ) * math.erf(3 * math.sqrt(1.5))
    assert expected == pytest.approx(1.0527, abs=1e-4)
    gauges = [256 * sigreg_gauge(gaussian(256, 32, seed)) for seed in range(40)]
    assert sum(gauges) / len(gauges) == pytest.approx(expected, rel=0.05)


def test_the_gauge_of_features_that_are_all_zero_has_its_closed_form():
    assert sigreg_gauge(torch.zeros(256, 16)) == pytest.approx(0.40223, rel=2e-3)


def test_the_gauge_orders_kinds_of_collapse_as_the_reference_measured():
    normal = gaussian(256, 16)
    half = normal.clone()
    half[:, 8:] = 0
    rank_one = normal[:, :1].expand(-1, 16) * 1.0
    assert 256 * sigreg_gauge(normal * 2) == pytest.approx(61, rel=0.15)
    assert 256 * sigreg_gauge(normal / 2) == pytest.approx(39, rel=0.15)
    assert 256 * sigreg_gauge(half) == pytest.approx(15, rel=0.35)
    assert sigreg_gauge(rank_one) > 10 * sigreg_gauge(normal)


def test_the_effective_rank_of_k_equal_orthogonal_directions_is_k():
    for rank in (1, 3, 8):
        features = torch.eye(8)[:rank].repeat(5, 1)
        assert effective_rank(features) == pytest.approx(rank, rel=1e-4)


def test_the_effective_rank_ignores_scale_and_rotation():
    features = gaussian(64, 16)
    rotation = torch.linalg.qr(gaussian(16, 16, 1)).Q
    assert effective_rank(7.5 * features @ rotation) == pytest.approx(
        effective_rank(features), rel=1e-4
    )


def test_collapsed_features_give_the_signals_of_collapse():
    one = gaussian(1, 32).expand(64, -1)
    signals = collapse_signals(one + 1e-4 * gaussian(64, 32, 1), num_clips=4)
    assert signals["feature_std"] < 1e-3
    assert signals["effective_rank"] < 1.05
    assert signals["clip_cosine"] > 0.9999


def test_features_that_only_tell_places_apart_are_found_out():
    places = gaussian(16, 32)
    signals = collapse_signals(places.repeat(4, 1), num_clips=4)
    assert signals["feature_std"] > 0.5
    assert signals["between_clip_share"] < 1e-6


def test_independent_features_are_spread_over_clips():
    signals = collapse_signals(gaussian(64, 32), num_clips=4)
    assert signals["between_clip_share"] > 0.9
    assert abs(signals["clip_cosine"]) < 0.2


def test_one_clip_has_no_signals_between_clips_and_bf16_is_measured_in_fp32():
    signals = collapse_signals(gaussian(16, 8).bfloat16(), num_clips=1)
    assert set(signals) == {"feature_std", "effective_rank", "sigreg_gauge"}


def test_features_that_do_not_divide_into_clips_are_refused():
    with pytest.raises(ValueError, match="10 features do not come from 4 clips"):
        collapse_signals(gaussian(10, 4), num_clips=4)


def history(losses, ranks, *, std=0.5, every=10):
    """Steps with the given losses; a measurement at every tenth."""
    reports = []
    for index, loss in enumerate(losses):
        rank = ranks[min(index // every, len(ranks) - 1)]
        health = {"feature_std": std, "effective_rank": rank} if index % every == 0 else None
        reports.append(replace(REPORT, step=index + 1, loss=loss, health=health))
    return reports


def falling(n=60):
    return [1.0 - index / (2 * n) for index in range(n)]


def test_diverse_features_are_healthy_and_a_rising_loss_does_not_change_that():
    rising = [0.4 + index / 200 for index in range(60)]
    health = verdict(history(rising, [10, 11, 13, 15, 18, 20]))
    assert health.state == "healthy"
    assert "rose from" in health.sentences[-1]
    assert "normal" in health.sentences[-1]


def test_a_falling_loss_does_not_hide_a_collapse():
    health = verdict(history(falling(), [20, 10, 5, 1.2, 1.1, 1.0], std=0.01))
    assert health.state == "collapsed"
    assert any("one direction" in sentence for sentence in health.sentences)
    assert "proves nothing" in health.sentences[-1]


def test_losing_half_of_the_best_rank_is_to_be_watched():
    health = verdict(history(falling(80), [5, 20, 30, 30, 30, 12, 12, 12]))
    assert health.state == "watch"
    assert "from a best of 30.0" in health.sentences[0]


def test_the_high_rank_of_untrained_features_is_not_held_against_the_run():
    health = verdict(history(falling(80), [170, 40, 30, 20, 20, 22, 24, 26]))
    assert health.state == "healthy"


def test_a_rank_that_has_only_fallen_from_its_untrained_start_is_to_be_watched():
    health = verdict(history(falling(), [24, 22, 20, 12, 8, 6]))
    assert health.state == "watch"
    assert "only fallen so far, from 22.0 to 8.0" in health.sentences[0]
    turned = verdict(history(falling(100), [24, 22, 20, 12, 8, 6, 8, 10, 11, 12]))
    assert turned.state == "healthy"


def test_a_rank_that_drops_with_a_new_stage_is_not_held_against_the_run():
    reports = history(falling(80), [10, 20, 26, 26, 6, 6, 7, 7])
    staged = [replace(report, stage=report.step // 41) for report in reports]
    assert verdict(reports).state == "watch"
    assert verdict(staged).state == "healthy"


def test_one_odd_measurement_does_not_change_the_verdict():
    assert verdict(history(falling(), [20, 20, 20, 20, 1.0, 20])).state == "healthy"


def test_without_or_with_few_measurements_the_verdict_is_to_watch():
    assert verdict([REPORT]).sentences[0].startswith("No features have been measured")
    early = verdict(history(falling(15), [20, 20]))
    assert early.state == "watch"
    assert "too early" in early.sentences[0]


def test_features_that_are_not_finite_are_a_collapse():
    assert verdict(history(falling(), [20, 20, 20, 20, 20, math.nan])).state == "collapsed"


def test_many_skipped_updates_are_to_be_watched():
    reports = [
        replace(report, skipped=index % 10 == 0)
        for index, report in enumerate(history(falling(), [20] * 6))
    ]
    health = verdict(reports)
    assert health.state == "watch"
    assert "6 of the last 60 updates" in health.sentences[0]


def test_an_alarm_is_raised_once_when_features_become_worse_and_not_before():
    watch, told = HealthWatch(), []
    for report in history(falling(120), [20, 20, 20, 20, 20, 20, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2]):
        told += [(report.step, alarm) for alarm in watch.watch(report)]
    assert [step for step, _ in told] == [71]
    assert told[0][1].startswith("the features went from healthy to collapsed: Nearly all")


def test_the_fall_that_healthy_runs_begin_with_calls_nobody_and_a_collapse_after_it_does():
    watch, told, states = HealthWatch(), [], set()
    ranks = [48, 40, 30, 22, 17, 16, 16, 17, 20, 24, 26, 26, 1.2, 1.2, 1.2]
    for report in history(falling(10 * len(ranks)), ranks):
        told += [(report.step, alarm) for alarm in watch.watch(report)]
        states |= {(report.step, watch.state)} if report.health else set()
    assert [step for step, _ in told] == [131]
    assert "to collapsed" in told[0][1]
    assert (61, "watch") in states  # whoever looks is told
    assert (101, "healthy") in states


def test_evidence_gives_value_limit_and_since_when():
    health = verdict(history(falling(60), [20, 20, 20, 1.2, 1.2, 1.2], std=0.5))
    by_signal = {one.signal: one for one in health.evidence}
    rank, spread = by_signal["effective_rank"], by_signal["feature_std"]
    assert (rank.value, rank.healthy, rank.state, rank.since_step) == (
        1.2, "above 3", "collapsed", 31,
    )  # fmt: skip
    assert (spread.state, spread.since_step) == ("healthy", 1)


def test_gates_and_verdict_have_one_threshold():
    (gate,) = [gate for gate in Objective.gates if gate.metric == "health.feature_std"]
    (limit,) = [limit for limit in LIMITS if limit.signal == "feature_std"]
    assert gate.threshold == limit.watch
