"""The tracker with real files, a real console and a real MLflow: up, refused, hanging, back."""

import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copyfile

import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipeline.environment import free_port
from pipeline.errors import StorageError
from pipeline.track.folder import read_json_object
from pipeline.track.ledger import run_ledger
from pipeline.track.metrics import (
    MlflowConfig,
    StageCost,
    TrackConfig,
    read_all_metrics,
    read_events,
)
from pipeline.track.mlflow_sink import MlflowSink, mlflow_run_id, upload_job
from pipeline.track.mlflow_upload import Uploader
from pipeline.track.sinks import Tracker
from tests.test_track_metrics import REPORT, write_steps

PLAN = (
    StageCost(name="short", steps=10, flops_per_step=1.0),
    StageCost(name="long", steps=10, flops_per_step=4.0),
)
OFF = TrackConfig(log_every_steps=5, mlflow=MlflowConfig(enabled=False))
CONFIG_YAML = (
    "name: demo\nglobal_batch: 8\nstages:\n- {name: short, steps: 10}\nnote: " + "x" * 2000
)


def track_config(uri=None, **changes):
    mlflow = MlflowConfig(tracking_uri=uri, timeout_seconds=1.0, upload_every_seconds=0.2)
    return TrackConfig(log_every_steps=1, mlflow=mlflow.model_copy(update=changes))


def report(step):
    return replace(REPORT, step=step, stage=step // 11, stage_name="short" if step < 11 else "long")


def make_tracker(config, run_dir, *, resume=False, terminal=False, **options):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160)
    tracker = Tracker(config, plan=PLAN, console=console, **options)
    tracker.start(run_dir, CONFIG_YAML, resume=resume)
    return tracker, text


def wait_until(condition, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow takes seconds to create its tables, so it does it once."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def run_dir(tmp_path, empty_database):
    path = tmp_path / "runs" / "demo"
    path.mkdir(parents=True)
    copyfile(empty_database, path.parent / "mlflow.db")
    return path


def test_a_step_is_in_the_file_when_log_returns(run_dir):
    tracker, _ = make_tracker(OFF, run_dir)
    for step in range(1, 4):
        tracker.log(report(step))
        assert [s.report for s in read_all_metrics(run_dir)] == [report(n + 1) for n in range(step)]
    tracker.close("finished")
    tracker.close("finished")


def test_without_a_terminal_there_is_a_plain_line_every_few_steps(run_dir):
    tracker, text = make_tracker(OFF, run_dir)
    tracker.event("start", step=0)
    for step in range(1, 21):
        tracker.log(replace(report(step), health={"effective_rank": 12.5}))
    tracker.event("save", step=20, seconds=1.5)
    tracker.close("finished")
    lines = text.getvalue().splitlines()
    steps = [line.split("step ")[1].split("/")[0] for line in lines if "loss" in line]
    assert steps == ["1", "5", "10", "15", "20"]
    assert "stage 2/2: long from step 11, 8 clips a step, 64 tokens a clip" in lines
    assert "4.0 clips/s  256 tokens/s  wait 5%  1.0 GiB  rank 12.5  ETA 0:00:00" in lines[-2]
    assert lines[-1] == "save at step 20: seconds 1.5"
    assert "\x1b" not in text.getvalue()


@pytest.mark.parametrize("kind", ["pipe", "disk", "terminal"])
def test_a_run_outlives_whoever_read_its_output(run_dir, monkeypatch, kind):
    with broken_output(kind) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        tracker = Tracker(OFF, plan=PLAN)
        tracker.start(run_dir, CONFIG_YAML, resume=False)
        tracker.event("start", step=0)
        for step in range(1, 21):
            tracker.log(report(step))
        tracker.close("finished")
        stream.flush()
    assert [step.report.step for step in read_all_metrics(run_dir)] == list(range(1, 21))
    assert [event.name for event in read_events(run_dir)] == ["start"]


@contextmanager
def broken_output(kind):
    """Nobody reads the pipe any more, the disk is full, the terminal has been closed."""
    if kind == "disk":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        other, output = os.pipe() if kind == "pipe" else os.openpty()
        os.close(other)
    with os.fdopen(output, "w", errors="replace") as stream:
        yield stream


def test_on_a_terminal_there_is_one_bar_that_ends_at_the_last_step(run_dir):
    tracker, text = make_tracker(OFF, run_dir, terminal=True)
    for step in range(1, 21):
        tracker.log(report(step))
    tracker.close("finished")
    assert "step 20/20" in text.getvalue()
    assert text.getvalue().count("step 7/20") == 0


def test_other_ranks_record_nothing(run_dir):
    tracker, text = make_tracker(OFF, run_dir, is_main=False)
    tracker.log(REPORT)
    tracker.event("fault", step=1)
    tracker.artifact(run_dir / "x")
    tracker.close("failed")
    assert list(run_dir.iterdir()) == []
    assert text.getvalue() == ""


def test_a_fresh_run_does_not_mix_with_one_that_is_there(run_dir):
    write_steps(run_dir, [1, 2])
    with pytest.raises(StorageError, match="already holds the steps"):
        make_tracker(OFF, run_dir)
    tracker, _ = make_tracker(OFF, run_dir, resume=True)
    tracker.event("resume", step=2)
    tracker.close("stopped")
    assert read_events(run_dir)[0].name == "resume"


def points(run_dir, key="loss"):
    """(step, value) of a metric in the run's own database."""
    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    history = client.get_metric_history(mlflow_run_id(run_dir), key)
    return sorted((metric.step, metric.value) for metric in history)


def test_one_mlflow_run_holds_a_run_that_was_stopped_and_resumed(run_dir):
    tracker, _ = make_tracker(track_config(), run_dir)
    for step in range(1, 6):
        tracker.log(report(step))
    wait_until(lambda: read_json_object(run_dir / "mlflow.json").get("state") == "up")
    tracker.close("stopped")
    first_id = mlflow_run_id(run_dir)
    (run_dir / "config.yaml").write_text(CONFIG_YAML.replace("batch: 8", "batch: 16"))
    (run_dir / "report.html").write_text("<p>report</p>")
    tracker, text = make_tracker(track_config(), run_dir, resume=True)
    tracker.artifact(run_dir / "report.html")
    for step in range(6, 11):
        tracker.log(report(step))
    tracker.close("finished")
    assert mlflow_run_id(run_dir) == first_id
    assert points(run_dir) == [(step, 0.5) for step in range(1, 11)]
    assert "warning" not in text.getvalue()
    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    run = client.get_run(first_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "demo")
    assert run.data.params["stages.0.steps"] == "10"
    assert len(run.data.params["note"]) == 500
    assert run.data.params["global_batch"] == "8"
    assert run.data.tags["changed.global_batch"] == "16"
    assert run.data.tags["jepa.host"] == socket.gethostname()
    assert {a.path for a in client.list_artifacts(first_id)} == {"config.yaml", "report.html"}
    assert any(key.startswith("system/cpu") for key in run.data.metrics)
    ledger = run_ledger(run_dir)
    assert run.data.metrics["time/effective_share"] == pytest.approx(
        ledger.effective_share, abs=0.1
    )
    assert not (Path.cwd() / "mlruns").exists()


def uploader(run_dir, uri=None):
    return Uploader(upload_job(track_config(uri, system_metrics=False), run_dir))


def test_a_batch_whose_answer_was_lost_leaves_no_duplicates(run_dir):
    write_steps(run_dir, range(1, 31))
    first = uploader(run_dir)
    assert first.work()
    state = json.loads((run_dir / "mlflow.json").read_text())
    assert state["uploaded"]["metrics.jsonl"] == (run_dir / "metrics.jsonl").stat().st_size
    # As if the process had died after MLflow took the batch and before it was noted.
    state["uploaded"] = {}
    (run_dir / "mlflow.json").write_text(json.dumps(state))
    write_steps(run_dir, range(31, 41))
    assert uploader(run_dir).work()
    assert points(run_dir) == [(step, 0.5) for step in range(1, 41)]


def test_a_lost_run_id_is_found_again_by_the_run_itself(run_dir):
    (run_dir / "run.json").write_text('{"run_id": "it\'s-7"}')
    write_steps(run_dir, [1])
    assert uploader(run_dir).work()
    first_id = mlflow_run_id(run_dir)
    (run_dir / "mlflow.json").unlink()
    assert uploader(run_dir).work()
    assert mlflow_run_id(run_dir) == first_id
    assert points(run_dir) == [(1, 0.5)]


def test_after_an_outage_everything_is_sent_once(run_dir):
    database = run_dir.parent / "mlflow.db"
    write_steps(run_dir, range(1, 6))
    sender = uploader(run_dir)
    assert sender.work()
    good = database.read_bytes()
    database.write_bytes(b"not a database")
    write_steps(run_dir, range(6, 11))
    broken = uploader(run_dir)
    assert not broken.work()
    assert read_json_object(run_dir / "mlflow.json")["state"] == "down"
    assert not broken.work(), "it pauses after a failure"
    write_steps(run_dir, range(11, 16))
    database.write_bytes(good)
    assert broken.work(at_once=True)
    assert points(run_dir) == [(step, 0.5) for step in range(1, 16)]
    assert read_json_object(run_dir / "mlflow.json")["state"] == "up"


def test_a_locked_database_only_delays(run_dir):
    write_steps(run_dir, range(1, 4))
    sender = uploader(run_dir)
    assert sender.work()
    write_steps(run_dir, range(4, 7))
    other = sqlite3.connect(run_dir.parent / "mlflow.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    unlock = threading.Timer(1.0, other.rollback)
    unlock.start()
    wait_until(lambda: sender.work(at_once=True))
    unlock.join()
    other.close()
    assert points(run_dir) == [(step, 0.5) for step in range(1, 7)]


def test_another_mlflow_gets_the_whole_run_from_the_start(run_dir):
    write_steps(run_dir, range(1, 4))
    assert uploader(run_dir).work()
    elsewhere = run_dir.parent / "elsewhere.db"
    assert uploader(run_dir, f"sqlite:///{elsewhere}").work()
    history = MlflowClient(f"sqlite:///{elsewhere}").get_metric_history(
        mlflow_run_id(run_dir), "loss"
    )
    assert sorted(metric.step for metric in history) == [1, 2, 3]


def test_probe_scores_are_sent_with_their_step(run_dir):
    write_steps(run_dir, [1])
    (run_dir / "probes").mkdir()
    score = {"task": "ssv2", "head": "linear", "step": 40, "top1": 0.25}
    (run_dir / "probes" / "a.json").write_text(json.dumps(score))
    sender = uploader(run_dir)
    assert sender.work()
    assert sender.work()
    assert points(run_dir, "probe/ssv2/linear/trained_top1") == [(40, 0.25)]


class HangingServer:
    """Takes connections and never answers."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.connections = []
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self):
        while True:
            try:
                self.connections.append(self.socket.accept()[0])
            except OSError:
                return

    def close(self):
        self.socket.close()
        for connection in self.connections:
            connection.close()


@contextmanager
def hanging_server():
    server = HangingServer()
    yield server
    server.close()


def test_a_server_that_hangs_holds_up_no_step_and_is_mentioned_once(run_dir):
    with hanging_server() as server:
        config = track_config(f"http://127.0.0.1:{server.port}")
        tracker, text = make_tracker(config, run_dir)
        wait_until(lambda: server.connections)
        for step in range(1, 11):
            tracker.log(report(step))
        assert len(read_all_metrics(run_dir)) == 10
        wait_until(lambda: read_json_object(run_dir / "mlflow.json").get("state") == "down")
        time.sleep(2.1)  # The tracker looks every two seconds.
        for step in range(11, 21):
            tracker.log(report(step))
        tracker.close("stopped")
    warnings = [line for line in text.getvalue().splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert "does not answer" in warnings[0]
    assert "sends the rest" in warnings[1]
    assert len(read_all_metrics(run_dir)) == 20


def test_a_refused_connection_is_mentioned_once_and_close_is_bounded(run_dir):
    tracker, text = make_tracker(track_config("http://127.0.0.1:9"), run_dir)
    tracker.log(report(1))
    wait_until(lambda: read_json_object(run_dir / "mlflow.json").get("state") == "down")
    time.sleep(2.1)
    for step in range(2, 11):
        tracker.log(report(step))
    began = time.monotonic()
    tracker.close("stopped")
    assert time.monotonic() - began < 10.0
    assert text.getvalue().count("127.0.0.1:9 does not answer") == 1


def test_the_uploading_process_ends_when_the_run_is_killed(run_dir):
    sink = MlflowSink(track_config(), run_dir)
    assert sink.start() is None
    worker = sink._worker
    assert worker is not None
    write_steps(run_dir, [1, 2])
    worker.stdin.close()  # What the system does with the pipe of a process that dies.
    assert worker.wait(timeout=60) == 0
    assert points(run_dir) == [(1, 0.5), (2, 0.5)]
    run = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}").get_run(mlflow_run_id(run_dir))
    assert (run.info.status, run.data.tags["jepa.status"]) == ("KILLED", "died")


def test_a_dead_uploading_process_is_a_warning(run_dir):
    tracker, text = make_tracker(track_config(), run_dir)
    tracker._mlflow._worker.kill()
    tracker._mlflow._worker.wait()
    tracker.log(report(1))
    tracker.log(report(2))
    tracker.close("finished")
    assert text.getvalue().count("uploading process ended") == 1


@pytest.mark.slow
def test_points_missed_while_a_real_server_was_down_arrive_once(run_dir, tmp_path):
    port = free_port()
    config = track_config(f"http://127.0.0.1:{port}")
    tracker, _ = make_tracker(config, run_dir)
    for step in range(1, 11):
        tracker.log(report(step))
    tracker.close("stopped")
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    server = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    try:
        wait_until(lambda: can_connect(port))
        tracker, _ = make_tracker(config, run_dir, resume=True)
        for step in range(11, 21):
            tracker.log(report(step))
        wait_until(lambda: read_json_object(run_dir / "mlflow.json").get("state") == "up")
        tracker.close("finished")
        client = MlflowClient(f"http://127.0.0.1:{port}")
        history = client.get_metric_history(mlflow_run_id(run_dir), "loss")
        assert sorted(metric.step for metric in history) == list(range(1, 21))
        assert client.get_run(mlflow_run_id(run_dir)).info.status == "FINISHED"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def can_connect(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
