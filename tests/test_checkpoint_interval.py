"""The time between checkpoints: the one that loses least, within bounds, by rank 0's clock."""

import threading

import numpy as np
import pytest

from pipeline.checkpoint.interval import SaveClock, SaveOutcome, SaveWord, derive_interval
from pipeline.checkpoint.layout import CheckpointConfig


def lost_share(interval: float, stall: float, between: float) -> float:
    """Stalled, and lost to failures: half an interval each."""
    return stall / interval + interval / (2 * between)


@pytest.mark.parametrize(("stall", "hours"), [(0.5, 2.8), (0.05, 24.0), (0.9, 24.0)])
def test_no_other_interval_loses_less_than_the_derived_one(stall, hours):
    best = derive_interval(stall, 10.0, hours).seconds
    others = np.geomspace(best / 20, best * 20, 400)
    losses = [lost_share(float(one), stall, 3600 * hours) for one in others]
    assert lost_share(best, stall, 3600 * hours) <= min(losses) + 1e-9


def test_the_derived_interval_keeps_its_bounds_and_says_so():
    slow = derive_interval(stall_seconds=60.0, save_seconds=5.0, hours_between_failures=1.0)
    assert slow.seconds == 6000.0
    assert "1 %" in slow.reason
    writing = derive_interval(stall_seconds=0.01, save_seconds=400.0, hours_between_failures=1.0)
    assert writing.seconds == 500.0
    rare = derive_interval(stall_seconds=1.0, save_seconds=5.0, hours_between_failures=10_000.0)
    assert rare.seconds == 3600.0
    assert "an hour" in rare.reason
    assert "10000 h" in rare.reason


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steps_are_counted_and_ask_no_clock():
    saves = SaveClock(CheckpointConfig(every_steps=3), Clock())
    assert [s for s in range(1, 10) if saves.must_save(s, SaveWord())] == [3, 6, 9]
    assert not saves.word().is_due
    assert saves.interval is None


def test_minutes_count_from_the_last_save_and_go_beside_steps():
    clock = Clock()
    saves = SaveClock(CheckpointConfig(every_steps=None, every_minutes=2.0), clock)
    clock.now += 119
    assert not saves.must_save(5, saves.word())
    clock.now += 2
    assert saves.must_save(5, saves.word())
    saves.note_begin(0.1)
    assert not saves.must_save(6, saves.word())
    both = SaveClock(CheckpointConfig(every_steps=4, every_minutes=2.0), clock)
    assert both.must_save(4, both.word())


def test_what_is_to_be_kept_for_good_is_written_whatever_the_clock_says():
    config = CheckpointConfig(every_steps="auto", keep_every_steps=4)
    saves = SaveClock(config, Clock())
    assert [s for s in range(1, 10) if saves.must_save(s, SaveWord())] == [4, 8]


def test_auto_waits_for_a_measurement_then_follows_it():
    clock = Clock()
    saves = SaveClock(CheckpointConfig(every_steps="auto", hours_between_failures=2.0), clock)
    clock.now += 10_000
    assert not saves.word().is_due
    saves.note_begin(0.5)
    saves.note_end(3.0)
    assert saves.interval is not None
    assert saves.interval.seconds == pytest.approx((2 * 0.5 * 7200) ** 0.5)
    clock.now += saves.interval.seconds - 1
    assert not saves.word().is_due
    clock.now += 2
    assert saves.word().is_due
    for _ in range(5):
        saves.note_begin(0.02)
        saves.note_end(3.0)
    assert saves.interval.seconds == pytest.approx((2 * 0.02 * 7200) ** 0.5)


def test_a_new_save_forgets_how_the_last_one_ended():
    saves = SaveClock(CheckpointConfig(), Clock())
    saves.outcome = SaveOutcome.FAILED
    assert saves.word().outcome is SaveOutcome.FAILED
    saves.note_begin(0.1)
    assert saves.word().outcome is SaveOutcome.NONE


def test_contradictory_settings_are_refused():
    with pytest.raises(ValueError, match="both null"):
        CheckpointConfig(every_steps=None)
    with pytest.raises(ValueError, match="leave every_minutes out"):
        CheckpointConfig(every_steps="auto", every_minutes=1.0)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        CheckpointConfig(every_steps=0)


def test_an_update_waits_for_the_copy_and_the_wait_counts_as_stall():
    saves = SaveClock(CheckpointConfig(every_steps="auto"))
    saves.wait_for_copy()  # nothing is being saved
    saves.note_begin(0.001)
    threading.Timer(0.2, saves.copied.set).start()
    saves.wait_for_copy()
    assert 0.1 < saves.held_up_seconds < 5
    saves.note_end(1.0)
    assert saves.interval is not None
    assert float(saves.interval.reason.split()[3]) == pytest.approx(
        saves.held_up_seconds + 0.001, abs=0.001
    )
