"""The ledger of time against runs whose every second is known."""

import random
from dataclasses import replace

import pytest

from pipeline.track.ledger import time_ledger
from pipeline.track.metrics import Event, LoggedStep
from tests.test_track_metrics import REPORT

START, STEP, WAIT, SAVE = 7.0, 2.0, 0.25, 3.0
SAVE_EVERY = 5


class SimulatedRun:
    """Plays a run with random deaths and books every second as it happens."""

    def __init__(self, seed, num_steps, lives=(1, 3, 5, 8, 100)):
        self.random = random.Random(seed)
        self.clock, self.num_steps = 1000.0, num_steps
        self.lives = lives
        self.steps, self.events = [], []
        self.saved = 0
        self.spent = dict.fromkeys(("kept", "wait", "starting", "saving", "lost", "down"), 0.0)

    @property
    def clock_seconds(self):
        return self.clock - 1000.0

    def play(self):
        while self.saved < self.num_steps:
            self.live()
        return self

    def live(self):
        self.event("resume" if self.events else "start", step=self.saved)
        self.clock += START
        since_save, step = [], self.saved
        death = step + self.random.choice(self.lives)
        while step < min(death, self.num_steps):
            step += 1
            self.take(step)
            since_save.append(step)
            if step % SAVE_EVERY == 0 or step == self.num_steps:
                self.clock += SAVE
                self.event("save", step=step, seconds=SAVE)
                self.spent["saving"] += SAVE
                self.spent["kept"] += len(since_save) * (STEP - WAIT)
                self.spent["wait"] += len(since_save) * WAIT
                self.saved, since_save = step, []
        self.spent["lost"] += len(since_save) * STEP
        self.spent["starting"] += START
        if self.saved < self.num_steps:
            down = self.random.uniform(1.0, 500.0)
            self.clock += down
            self.spent["down"] += down

    def take(self, step):
        self.clock += STEP
        report = replace(REPORT, step=step, step_seconds=STEP, data_wait_seconds=WAIT)
        self.steps.append(LoggedStep(time=self.clock, report=report))

    def event(self, name, *, step, **details):
        self.events.append(Event(time=self.clock, name=name, step=step, details=details))


@pytest.mark.parametrize("seed", range(40))
def test_every_second_of_a_run_with_many_deaths_is_booked_once_and_rightly(seed):
    run = SimulatedRun(seed, num_steps=200).play()
    ledger = time_ledger(run.steps, run.events)
    assert ledger is not None
    assert ledger.training_seconds == pytest.approx(run.spent["kept"])
    assert ledger.data_wait_seconds == pytest.approx(run.spent["wait"])
    assert ledger.saving_seconds == pytest.approx(run.spent["saving"])
    assert ledger.lost_seconds == pytest.approx(run.spent["lost"])
    assert ledger.starting_seconds == pytest.approx(run.spent["starting"])
    assert ledger.down_seconds == pytest.approx(run.spent["down"])
    assert ledger.other_seconds == pytest.approx(0.0, abs=1e-6)
    assert ledger.wall_seconds == pytest.approx(sum(run.spent.values()))
    assert len(ledger.attempts) == sum(event.name != "save" for event in run.events)


def test_ten_thousand_deaths_still_sum_to_the_wall_time():
    run = SimulatedRun(0, num_steps=30_000, lives=(1, 3, 5, 8)).play()
    ledger = time_ledger(run.steps, run.events)
    assert ledger is not None
    assert len(ledger.attempts) > 10_000
    parts = (
        ledger.training_seconds + ledger.data_wait_seconds + ledger.starting_seconds
        + ledger.saving_seconds + ledger.lost_seconds + ledger.down_seconds + ledger.other_seconds
    )  # fmt: skip
    assert parts == pytest.approx(ledger.wall_seconds, rel=1e-9)
    assert ledger.wall_seconds == pytest.approx(run.clock - 1000.0)


def test_the_phases_add_up_to_the_wall_time_and_agree_with_an_independent_count():
    run = SimulatedRun(3, num_steps=300).play()
    for event in run.events:
        if event.name in ("start", "resume"):
            event.details["start_up_seconds"] = {"imports": 2.0, "meeting": 0.5, "building": 4.0}
    ledger = time_ledger(run.steps, run.events)
    assert ledger is not None
    lives = len(ledger.attempts)
    assert ledger.phases == pytest.approx(
        {
            "init": lives * 2.5,
            "load": lives * (START - 2.5),
            "step": run.spent["kept"],
            "stall": run.spent["wait"],
            "save": run.spent["saving"],
            "lost": run.spent["lost"],
            "down": run.spent["down"],
        }
    )
    assert sum(ledger.phases.values()) == pytest.approx(ledger.wall_seconds)
    assert ledger.effective_share == pytest.approx(run.spent["kept"] / run.clock_seconds)


def test_a_save_behind_the_training_counts_for_what_it_stalled():
    run = SimulatedRun(0, num_steps=4, lives=(100,))
    run.event("start", step=0)
    for step in range(1, 5):
        run.take(step)
        if step == 2:
            run.clock += 0.5
            run.event("save_begun", step=2, seconds=0.5)
        if step == 3:
            run.clock += 1.0
            run.event("save", step=2, seconds=1.0, behind_seconds=2.5)
    ledger = time_ledger(run.steps, run.events)
    assert ledger is not None
    assert ledger.saving_seconds == pytest.approx(1.5)
    assert ledger.other_seconds == pytest.approx(0.0, abs=1e-9)


def test_the_time_that_a_hang_took_to_be_found_is_stall():
    run = SimulatedRun(0, num_steps=2, lives=(100,))
    run.event("start", step=0)
    run.take(1)
    run.take(2)
    run.clock += 33.0
    run.event("fault", step=3, reason="hang: rank 1 gives no sign of life")
    ledger = time_ledger(run.steps, run.events)
    assert ledger is not None
    assert ledger.phases["stall"] == pytest.approx(33.0 + 2 * WAIT)
    assert sum(ledger.phases.values()) == pytest.approx(ledger.wall_seconds)


def test_an_attempt_says_why_it_ended():
    run = SimulatedRun(0, num_steps=1)
    run.event("start", step=0)
    run.take(1)
    run.event("stop", step=1, reason="SIGTERM")
    run.clock += 10
    run.event("resume", step=1)
    run.take(2)
    run.clock += 10
    run.event("resume", step=1)
    run.take(2)
    ledger = time_ledger(run.steps, run.events)
    assert ledger is not None
    endings = [attempt.ending for attempt in ledger.attempts]
    assert endings == ["stopped: SIGTERM", "died without a word", "no word yet"]


def test_loading_before_the_start_event_counts_as_starting_not_as_down():
    run = SimulatedRun(0, num_steps=5, lives=(100,))
    for begin in (1000.0, 2000.0):
        run.clock = begin + 20.0
        run.event("start" if begin == 1000.0 else "resume", step=0)
        run.take(1)
    # The third attempt died while loading and left no event.
    run.clock = 3020.0
    run.event("resume", step=0)
    run.take(1)
    ledger = time_ledger(run.steps, run.events, starts=[1000.0, 2000.0, 2500.0, 3000.0])
    assert ledger is not None
    assert [attempt.begin for attempt in ledger.attempts] == [1000.0, 2000.0, 2500.0, 3000.0]
    assert ledger.starting_seconds == pytest.approx(60.0)
    without = time_ledger(run.steps, run.events, starts=[3000.0])
    assert without is not None
    assert [attempt.begin for attempt in without.attempts] == [1020.0, 2020.0, 3000.0]


def test_a_run_without_events_is_one_attempt_and_one_without_signs_has_no_ledger():
    run = SimulatedRun(0, num_steps=3)
    for step in (1, 2, 3):
        run.take(step)
    ledger = time_ledger(run.steps, [])
    assert ledger is not None
    assert ledger.wall_seconds == pytest.approx(3 * STEP)
    assert ledger.effective_share == pytest.approx((STEP - WAIT) / STEP)
    assert time_ledger([], []) is None
