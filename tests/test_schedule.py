"""Schedules give the reference's values, step for step."""

import math

import pytest
from pydantic import ValidationError

from pipeline.schedule import LearningRate, Ramp, cosine, learning_rate, linear

PRIMARY = LearningRate(shape="constant", start=1e-4, peak=5.25e-4, warmup_steps=12_000)
COOLDOWN = LearningRate(shape="linear", peak=5.25e-4, end=1e-6)
SHIPPED_COOLDOWN = LearningRate(shape="linear", peak=5.25e-4, end=1e-6, horizon_steps=15_000)


@pytest.mark.parametrize(
    ("config", "step", "num_steps", "expected"),
    [
        (PRIMARY, 1, 240_000, 1.0003542e-4),
        (PRIMARY, 11_999, 240_000, 5.24964583e-4),
        (PRIMARY, 12_000, 240_000, 5.25e-4),
        (PRIMARY, 240_000, 240_000, 5.25e-4),
        (COOLDOWN, 1, 12_000, 5.24956333e-4),
        (COOLDOWN, 12_000, 12_000, 1e-6),
        (SHIPPED_COOLDOWN, 1, 12_000, 5.24965067e-4),
        (SHIPPED_COOLDOWN, 6_000, 12_000, 3.154e-4),
        (SHIPPED_COOLDOWN, 12_000, 12_000, 1.058e-4),
    ],
)
def test_learning_rate_equals_the_reference(config, step, num_steps, expected):
    assert learning_rate(config, step, num_steps) == pytest.approx(expected, rel=1e-7)


def test_debug_run_of_3000_steps_ends_inside_its_warmup():
    # The released ViT-L file: 3,000 steps of a 12,000-step warm-up. As a config of ours it is
    # refused; the value is the reference's own and pins the warm-up formula.
    assert learning_rate(PRIMARY, 3_000, 240_000) == pytest.approx(2.0625e-4)
    with pytest.raises(ValueError, match="warmup_steps is 12000, more than the stage's 3000"):
        PRIMARY.check(3_000)


def test_cosine_falls_from_peak_through_the_middle_to_the_end():
    config = LearningRate(shape="cosine", start=2e-4, peak=6.25e-4, end=1e-6, warmup_steps=12_000)
    assert learning_rate(config, 12_000, 90_000) == pytest.approx(6.25e-4)
    assert learning_rate(config, 51_000, 90_000) == pytest.approx((6.25e-4 + 1e-6) / 2)
    assert learning_rate(config, 90_000, 90_000) == pytest.approx(1e-6)


def test_v_jepa_1_schedule_stretched_by_a_quarter_ends_at_its_published_value():
    config = LearningRate(
        shape="cosine", start=2e-4, peak=6.25e-4, end=1e-6, warmup_steps=12_000,
        horizon_steps=112_500,
    )  # fmt: skip
    assert learning_rate(config, 90_000, 90_000) == pytest.approx(7.5e-5, rel=0.01)


def test_weight_decay_follows_a_cosine_of_the_whole_run():
    ramp = Ramp(start=0.04, end=0.4)
    # V-JEPA 1: 90,000 steps of a curve of 112,500 reach 0.366.
    assert cosine(ramp, 90_000, 112_500) == pytest.approx(0.366, abs=5e-4)
    assert cosine(ramp, 90_000, 90_000) == pytest.approx(0.4)
    assert cosine(Ramp(start=0.04, end=0.04), 17, 100) == pytest.approx(0.04, abs=1e-15)


def test_momentum_is_a_line_that_begins_exactly_at_its_start():
    ramp = Ramp(start=0.998, end=1.0)
    assert linear(ramp, 1, 100) == 0.998
    # V-JEPA 1: 0.9996 at the end of 90,000 steps of a line of 112,500.
    assert linear(ramp, 90_000, 112_500) == pytest.approx(0.9996, abs=1e-6)
    assert linear(Ramp(start=0.99925, end=0.99925), 252_000, 252_000) == 0.99925


@pytest.mark.parametrize("step", [0, -1, 101])
def test_steps_outside_the_run_are_refused(step):
    ramp = Ramp(start=0.0, end=1.0)
    config = LearningRate(shape="constant", peak=1e-3)
    for call in (
        lambda: learning_rate(config, step, 100),
        lambda: cosine(ramp, step, 100),
        lambda: linear(ramp, step, 100),
    ):
        with pytest.raises(ValueError, match=f"step {step} is not one of 1 … 100"):
            call()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "constant", "peak": 1e-3, "warmup_steps": 5}, "start is missing"),
        ({"shape": "linear", "peak": 1e-3}, "end is missing"),
        ({"shape": "cosine", "peak": 1e-3}, "end is missing"),
        ({"shape": "constant", "peak": 1e-3, "start": 1e-4}, "start has no effect"),
        ({"shape": "constant", "peak": 1e-3, "end": 1e-4}, "end has no effect"),
        ({"shape": "constant", "peak": 1e-3, "horizon_steps": 9}, "horizon_steps has no effect"),
        ({"shape": "linear", "peak": 0.0, "end": 0.0}, "greater than 0"),
        ({"shape": "step", "peak": 1e-3}, "'constant', 'linear' or 'cosine'"),
        ({"shape": "constant", "peak": math.nan}, "finite"),
    ],
)
def test_missing_and_unread_keys_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        LearningRate(**values)


@pytest.mark.parametrize(
    ("values", "num_steps", "message"),
    [
        ({"end": 0.0, "horizon_steps": 99}, 100, "horizon_steps is 99, less than"),
        ({"end": 0.0, "start": 0.0, "warmup_steps": 100}, 100, "has no step left"),
        ({"end": 0.0, "start": 0.0, "warmup_steps": 101}, 100, "warmup_steps is 101, more than"),
    ],
)
def test_a_curve_that_does_not_fit_its_stage_is_refused(values, num_steps, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(shape="linear", peak=1e-3, **values).check(num_steps)


def test_a_stage_may_be_all_warmup_if_the_curve_goes_on_behind_it():
    config = LearningRate(
        shape="linear", start=0.0, peak=1e-3, end=0.0, warmup_steps=100, horizon_steps=200
    )
    config.check(100)
    assert learning_rate(config, 100, 100) == pytest.approx(1e-3)
