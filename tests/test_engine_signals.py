"""Signals and lost ranks in real runs: what is saved, how it ends, and what is told of it."""

import json
import os
import re
import signal
import socket
import time

import pytest

from pipeline.checkpoint import layout
from pipeline.engine.stop import StopReason, StopWatch
from pipeline.errors import ExitCode
from pipeline.limits import StopConfig
from pipeline.track.metrics import read_events, read_metrics
from tests.running import (
    faulty,
    finish,
    jepa,
    long_stage,
    rank_pids,
    reasons,
    wait_for_step,
    wait_until,
    write_config,
)
from tests.shards import write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    write_dataset(folder / "data", 24)
    return folder


SLOW_WRITE = [{"rank": 1, "fault": "slow_write", "seconds": 3}]


@pytest.fixture(scope="module")
def saving(folder):
    """A run that gets SIGTERM twice while it stands still for the save of step 2."""
    config = write_config(
        folder, "saving", stages=long_stage(), checkpoint={"background": False}
    )  # fmt: skip
    run = folder / "saving"
    process = faulty(SLOW_WRITE, run, "train", config)
    partial = run / "checkpoints"
    wait_until(lambda: any(partial.glob("step-00000002.partial*")), "the save of step 2")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    code, output = finish(process)
    assert code == ExitCode.SAVED_RUN_AGAIN, output
    return run


def test_a_signal_during_a_save_costs_neither_another_step_nor_another_save(saving):
    assert [step.report.step for step in read_metrics(saving)] == [1, 2]
    assert [commit.step for commit in layout.list_commits(saving)] == [0, 2]
    assert reasons(saving, "stop") == ["SIGTERM was received"]


def test_with_too_little_grace_nothing_is_begun_and_the_last_checkpoint_stands(saving):
    config = saving / "config.yaml"
    config.write_text(
        config.read_text().replace("grace_seconds: null", "grace_seconds: 1.0")
    )  # fmt: skip
    process = faulty(SLOW_WRITE, saving, "resume", saving)
    wait_for_step(saving, 5)  # one save of this attempt has been measured
    process.send_signal(signal.SIGUSR2)
    code, output = finish(process)
    assert code == ExitCode.SAVED_RUN_AGAIN, output
    newest = layout.list_commits(saving)[-1].step
    told = reasons(saving, "stop")[-1]
    assert re.search(r"not enough time to save \(need \d s, have [01] s\)", told)
    assert told.endswith(f"the last checkpoint is step {newest}")
    assert newest < read_metrics(saving)[-1].report.step
    starts = json.loads((saving / "run.json").read_text())["starts"]
    assert ["ended" in start for start in starts] == [True, False], "it counts as no progress"


def test_a_rank_that_is_stopped_is_named_by_the_others_with_phase_and_stacks(folder):
    config = write_config(
        folder, "frozen", stages=long_stage(), guards={"hang_seconds": 8.0}
    )  # fmt: skip
    run = folder / "frozen"
    process = jepa("train", config, "--ranks", 2)
    wait_for_step(run, 4)
    os.kill(rank_pids(process)[1], signal.SIGSTOP)
    code, output = finish(process)
    assert code == ExitCode.PEER_LOST, output
    told = reasons(run, "fault")[-1]
    assert f"rank 1 on {socket.gethostname()} gives no sign of life since it was in" in told
    stacks = (run / "faults" / "stacks-rank-00000.txt").read_text()
    assert "pipeline/engine/loop.py" in stacks
    assert "Thread" in stacks
    assert b"gloo:all_gather" in (run / "faults" / "collectives-rank-0").read_bytes()


def test_an_error_of_another_rank_is_in_the_events_as_the_cause(folder):
    config = write_config(folder, "error", stages=long_stage())
    faults = [{"rank": 1, "step": 3, "fault": "raise"}]
    code, output = finish(faulty(faults, folder / "error", "train", config))
    assert code == ExitCode.BUG, output
    told = [event for event in read_events(folder / "error") if event.name == "fault"]
    assert told[-1].details["reason"] == "ValueError: on order at step 3"
    assert (told[-1].details["rank"], told[-1].step) == (1, 3)
    assert told[0].details["kind"] == "PeerLostError"


def test_an_owner_who_was_replaced_stops_and_writes_nothing_more(folder):
    config = write_config(
        folder, "fenced", stages=long_stage(micro_batch=8), data={"workers": 0}
    )  # fmt: skip
    run = folder / "fenced"
    process = jepa("train", config)
    wait_for_step(run, 3)
    os.kill(process.pid, signal.SIGSTOP)  # paused, as another job takes the run over
    lease = next((run / "lease").glob("0*.json"))
    other = json.dumps({"host": "gpu017", "pid": 7, "process": "a/b/1"})
    (run / "lease" / "00000002.json").write_text(other)
    lease.unlink()
    before = {path: path.read_bytes() for path in run.glob("*.jsonl")}
    commits = [commit.step for commit in layout.list_commits(run)]
    os.kill(process.pid, signal.SIGCONT)
    code, output = finish(process)
    assert code == ExitCode.USAGE, output
    assert "was taken over by process 7 on gpu017" in output
    after = {path: path.read_bytes() for path in run.glob("*.jsonl")}
    assert {path: content[:200] for path, content in after.items()} == {
        path: content[:200] for path, content in before.items()
    }
    assert len(after[run / "metrics.jsonl"]) - len(before[run / "metrics.jsonl"]) < 2000
    assert [commit.step for commit in layout.list_commits(run)] == commits
    assert not (run / "faults").exists()


def test_a_time_limit_is_a_reason_to_stop_while_there_is_time_to_save(tmp_path):
    now = time.time()
    watch = StopWatch(
        tmp_path, is_main=True, config=StopConfig(margin_seconds=60), job_end=now + 90
    )
    watch.expect(step_seconds=1.0, save_seconds=10.0)
    assert watch.noted is StopReason.NONE
    assert watch.seconds_left == pytest.approx(90, abs=2)
    watch.expect(step_seconds=1.0, save_seconds=40.0)
    assert watch.noted is StopReason.TIME_LIMIT
    other = StopWatch(tmp_path, is_main=False, job_end=now)
    assert other.noted is StopReason.NONE, "one clock decides for all"


@pytest.mark.parametrize("settings", [{"max_hours": 0.5}, {"at": "2999-01-01T00:00:00+00:00"}])
def test_a_run_may_set_its_own_limit_and_may_be_late(tmp_path, settings):
    watch = StopWatch(tmp_path, is_main=True, config=StopConfig(**settings))
    assert watch.seconds_left == float("inf")
    assert watch.noted is StopReason.NONE
    watch.expect(step_seconds=1.0, save_seconds=1700.0 if "max_hours" in settings else 1e11)
    assert watch.noted is StopReason.NONE or "at" in settings
    watch.expect(step_seconds=1.0, save_seconds=1740.0 if "max_hours" in settings else 1e11)
    assert watch.noted is StopReason.TIME_LIMIT


def test_the_grace_runs_from_the_first_signal_and_a_keyboard_gives_any(tmp_path):
    watch = StopWatch(tmp_path, is_main=True, config=StopConfig(grace_seconds=5.0))
    with watch.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.seconds_left == float("inf")
        os.kill(os.getpid(), signal.SIGTERM)
        first = watch.seconds_left
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.seconds_left < first <= 5.0
        assert watch.noted is StopReason.SIGTERM


@pytest.mark.parametrize("at", ["tomorrow", "2026-03-01T06:00:00"])
def test_a_time_without_date_or_zone_is_refused(at):
    with pytest.raises(ValueError, match="2026-03-01"):
        StopConfig(at=at)
