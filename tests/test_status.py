"""`jepa status` and `jepa stop` on runs in every state."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.checkpoint.save import SaveRequest, save
from pipeline.cli import main
from pipeline.errors import ExitCode
from pipeline.report.facts import gather
from pipeline.track.faults import RankFault, write_fault
from pipeline.track.folder import write_json
from pipeline.track.lease import acquire
from tests.run_folder import RunFolder, finished_run


def status(path, capsys):
    assert main(["status", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def live(tmp_path, monkeypatch):
    """A run that has just taken its 47th step."""
    run = RunFolder(tmp_path / "live").start().steps(1, 47)
    monkeypatch.setattr("pipeline.report.facts.time.time", lambda: run.clock + 1.0)
    return run


def test_a_live_run_tells_its_place_rate_and_time_left(live, capsys):
    told = status(live.path, capsys)
    assert told["state"] == "running"
    assert (told["step"], told["num_steps"]) == (47, 120)
    assert told["stage"].startswith("short-64, 1 of 3: step 47 of 60, 8 frames at 64 px")
    assert told["clips_per_second"] == pytest.approx(8 / 0.21, rel=0.1)
    # 13 steps of 0.21 s, and 60 larger ones of unknown speed.
    assert told["eta_seconds"] > 13 * 0.21 + 60 * 0.21
    assert told["health"] == "healthy"
    assert told["checkpoints"] == []
    assert (told["owner"], told["last_good_checkpoint"]) == (None, None)
    assert sum(told["phases"].values()) == pytest.approx(47 * 0.21 + 9.5 + 0.8, rel=0.1)
    assert told["health_evidence"][0]["healthy"] == "above 0.1"


def test_a_run_without_a_sign_of_life_is_silent_not_running(live, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.report.facts.time.time", lambda: live.clock + 500.0)
    told = status(live.path, capsys)
    assert told["state"] == "silent"
    assert "No sign of life since" in told["summary"]
    assert f"jepa resume {live.path}" in told["summary"]


def test_slow_steps_are_given_more_patience(live, monkeypatch):
    quick = live.report
    live.report = lambda step, rank: replace(quick(step, rank), stage=1, step_seconds=60.0)
    live.steps(48, 60)
    for seconds, state in ((500.0, "running"), (700.0, "silent")):
        now = live.clock + seconds
        monkeypatch.setattr("pipeline.report.facts.time.time", lambda now=now: now)
        assert gather(live.path).state == state


@pytest.mark.parametrize(
    ("event", "state", "words"),
    [
        ("end", "finished", "Finished at step 47 of 120: why"),
        ("stop", "stopped", "Stopped at step 47 of 120: why; `jepa resume"),
        ("fault", "failed", "Failed at step 47 of 120: why; when the cause is mended"),
    ],
)
def test_an_ended_run_says_why_and_what_next(live, capsys, event, state, words):
    live.event(event, reason="why")
    told = status(live.path, capsys)
    assert (told["state"], told["reason"]) == (state, "why")
    assert words in told["summary"]


def test_a_resumed_run_has_left_its_earlier_end_behind(live, capsys, monkeypatch):
    live.event("fault", reason="disk full")
    live.clock += 30.0
    live.start(step=30)
    told = status(live.path, capsys)
    assert told["state"] == "running"
    assert told["errors"][0]["message"] == "disk full"
    assert told["num_starts"] == 2


def test_processes_that_are_loading_are_starting(live, capsys):
    live.event("stop", reason="SIGTERM was received")
    live.clock += 30.0
    live.starts.append({**live.starts[0], "time": "2025-11-22T09:00:00+00:00"})
    live.clock = 1_763_802_003.0
    write_json(live.path / "run.json", {"run_id": "x", "starts": live.starts})
    assert status(live.path, capsys)["state"] == "starting"


def test_text_shows_what_json_shows(tmp_path, capsys):
    run = finished_run(tmp_path / "demo")
    run.event("save_failed", step=120, reason="no space: need 3 MiB")
    assert main(["status", str(run.path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("finished", "step 120 of 120", "cooldown-96, 3 of 3", "8.6 clips/s",
                  "healthy", "56.7 %", "2 left out", "no space: need 3 MiB"):  # fmt: skip
        assert words in text


def test_a_wrong_path_names_the_nearest_runs(tmp_path, capsys):
    RunFolder(tmp_path / "vitl-long").start()
    assert main(["status", str(tmp_path / "vitl-lnog")]) == 2
    error = capsys.readouterr().err
    assert "does not exist" in error
    assert f"Did you mean {tmp_path / 'vitl-long'}?" in error
    assert main(["status", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("starts", ["3", "[3]", '[{"time": "yesterday"}]', '[{"step": 0}]'])
def test_records_of_another_form_are_named_and_not_stumbled_over(live, capsys, starts):
    (live.path / "run.json").write_text(f'{{"starts": {starts}}}')
    assert main(["status", str(live.path)]) == ExitCode.STORAGE
    told = capsys.readouterr().err
    assert f"{live.path / 'run.json'}: expected `starts` as a list" in told
    assert "Restore the file" in told


def test_a_configuration_of_another_version_does_not_hide_the_rest(live, capsys):
    (live.path / "config.yaml").write_text("name: live\nretired_key: 1\n")
    told = status(live.path, capsys)
    assert told["step"] == 47
    assert told["num_steps"] is None
    assert "retired_key" in told["config_problem"]


def test_an_mlflow_that_is_down_is_mentioned(live, capsys):
    write_json(live.path / "mlflow.json", {"state": "down", "error": "refused", "run_id": None})
    assert main(["status", str(live.path)]) == 0
    assert "does not answer: refused" in capsys.readouterr().out


def test_the_last_words_of_other_ranks_are_told_with_the_cause_first(live, capsys):
    lost = "PeerLostError: Rank 0 of 2 lost its peers"
    write_fault(
        live.path,
        RankFault(attempt=1, rank=0, reason=lost, exit_code=76, kind="PeerLostError",
                  time=live.clock + 0.4),
    )  # fmt: skip
    write_fault(
        live.path,
        RankFault(attempt=1, rank=1, reason="DataError: a worker died", exit_code=65,
                  kind="DataError", host="gpu017", step=47, time=live.clock + 0.2),
    )  # fmt: skip
    told = status(live.path, capsys)
    assert (told["state"], told["reason"]) == ("failed", "DataError: a worker died")
    assert [(error["rank"], error["step"]) for error in told["errors"]] == [(1, 47), (0, None)]


def test_the_owner_of_a_run_is_told_until_it_gives_the_run_up(live, capsys):
    lease = acquire(live.path)
    assert f"process {os.getpid()} on " in status(live.path, capsys)["owner"]
    lease.release()
    assert status(live.path, capsys)["owner"] is None


def test_a_run_whose_owner_was_killed_on_this_machine_is_silent_at_once(live, capsys):
    words = "from pathlib import Path; import sys, os; from pipeline.track.lease import acquire; "
    words += "acquire(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", words, str(live.path)], check=False, timeout=60)
    told = status(live.path, capsys)
    assert (told["state"], "which is no more" in told["owner"]) == ("silent", True)
    assert "its process is no more; `jepa resume" in told["summary"]
    lease = acquire(live.path)
    assert status(live.path, capsys)["state"] == "running"
    lease.release()  # as a start does that is refused
    assert status(live.path, capsys)["state"] == "silent"


def test_a_damaged_newest_checkpoint_is_told_beside_the_last_good_one(live, capsys):
    for step in (20, 40):
        write_commit(live.path, step)
    assert status(live.path, capsys)["last_good_checkpoint"] == 40
    weights = live.path / "checkpoints" / "step-00000040" / "weights"
    weights.write_bytes(b"other")  # as many bytes
    assert status(live.path, capsys)["last_good_checkpoint"] == 40
    assert main(["status", str(live.path), "--json", "--verify"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["last_good_checkpoint"] == 20
    assert "its digest differs" in told["damaged_checkpoints"]["40"]
    weights.write_bytes(b"short"[:3])
    assert status(live.path, capsys)["last_good_checkpoint"] == 20


def write_weights(folder):
    (folder / "weights").write_bytes(b"bytes")


def write_commit(run, step):
    (run / "checkpoints").mkdir(exist_ok=True)
    result = save(
        SaveRequest(
            run_dir=run,
            run_id="cafe",
            step=step,
            parent_step=None,
            versions={},
            write=write_weights,
        )
    )
    assert result.failure is None


def test_watching_ends_with_the_run(live, capsys, monkeypatch):
    def sleep(_seconds):
        live.event("end", step=47, reason="all stages are done")

    monkeypatch.setattr("pipeline.commands.status.time.sleep", sleep)
    assert main(["status", str(live.path), "--watch", "--json"]) == 0
    told = capsys.readouterr().out
    states = [line for line in told.splitlines() if line.startswith('  "state"')]
    assert states == ['  "state": "running",', '  "state": "finished",']


def test_stop_writes_the_file_that_the_loop_looks_for(live, capsys):
    assert main(["stop", str(live.path)]) == 0
    assert (live.path / "stop").is_file()
    said = capsys.readouterr().out
    assert "saves a checkpoint" in said
    assert f"jepa resume {live.path}" in said
    assert status(live.path, capsys)["state"] == "stopping"


def test_stop_says_when_nothing_may_be_there_to_obey(live, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.report.facts.time.time", lambda: live.clock + 500.0)
    assert main(["stop", str(live.path)]) == 0
    assert "no sign of life" in capsys.readouterr().out


def test_stop_refuses_a_run_that_has_ended(live, capsys):
    live.event("end", step=47, reason="all stages are done")
    assert main(["stop", str(live.path)]) == 2
    assert "cannot be stopped now. Finished" in capsys.readouterr().err
    assert not (live.path / "stop").exists()
