"""Launchers know by a run's own events whether it was stopped on purpose."""

import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from data_prep.driver import Stopped, stopped_by_signal
from launch.job import NEVER_AGAIN
from launch.slurm import BODY
from launch.stopped import is_stopped_for_good
from pipeline.conduct.stop import StopSignals
from pipeline.engine.stop import StopReason
from pipeline.track.metrics import MlflowConfig, TrackConfig
from pipeline.track.sinks import Tracker


@pytest.mark.parametrize(
    ("name", "reason", "is_on_purpose"),
    [
        ("stop", StopReason.STOP_FILE.words, True),
        ("stop", StopReason.TIME_LIMIT.words, True),
        ("stop", f"{StopReason.STOP_FILE.words} before the first step; nothing to save", True),
        ("stop", StopReason.SIGTERM.words, False),
        ("stop", StopReason.SIGUSR2.words, False),
        ("stop", "the loss is 9 times its mean; going back to step 4", False),
        ("fault", "no space is left", False),
        ("end", "all stages are done", False),
        ("resume", "", False),
    ],
)
def test_only_a_run_stopped_on_purpose_is_left_stopped(tmp_path, name, reason, is_on_purpose):
    """A pod of it ends with 0; the batch script of Slurm looks for the same words."""
    tracker = Tracker(TrackConfig(mlflow=MlflowConfig(enabled=False)))
    tracker.start(tmp_path, "name: a\n", resume=False)
    tracker.event("start", step=0, world_size=1)
    tracker.event(name, reason=reason)
    tracker.close("stopped")
    assert is_stopped_for_good(tmp_path, patience_seconds=0.0) is is_on_purpose
    look = re.search(r"stop=\$\((grep .*) \"\$run_dir/events.jsonl\"", BODY.read_text())
    assert look is not None
    found = subprocess.run(
        ["bash", "-c", f"{look[1]} events.jsonl"], cwd=tmp_path, capture_output=True, check=False
    )
    assert (reason.encode() in found.stdout and found.stdout != b"") is (name == "stop")


def test_a_run_that_has_said_nothing_yet_is_not_stopped(tmp_path):
    assert not is_stopped_for_good(tmp_path, patience_seconds=0.0)


def test_all_launchers_take_the_same_codes_for_final():
    listed = re.search(r"for final in ([0-9 ]+);", BODY.read_text())
    assert listed is not None
    assert sorted(map(int, listed[1].split())) == sorted(int(code) for code in NEVER_AGAIN)


@pytest.fixture
def warning() -> Iterator[signal.Signals]:
    """The signal that every batch script asks for, before the time limit."""
    asked = re.search(r"trap '[^']*remind' (\w+)", BODY.read_text())
    assert asked is not None
    number = signal.Signals[f"SIG{asked[1]}"]
    before = {one: signal.getsignal(one) for one in (number, signal.SIGTERM)}
    yield number
    for one, handler in before.items():
        signal.signal(one, handler)


def test_preparation_stops_in_good_order_when_it_is_warned_and_reminded(warning):
    def work() -> None:
        try:
            signal.raise_signal(warning)
        finally:
            signal.raise_signal(warning)

    with pytest.raises(Stopped), stopped_by_signal():
        work()


def test_the_conductor_stops_in_good_order_when_it_is_warned(warning):
    stop = StopSignals()
    with stop.listening():
        signal.raise_signal(warning)
        signal.raise_signal(warning)
    assert stop.name == warning.name
