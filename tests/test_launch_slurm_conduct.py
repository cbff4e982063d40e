"""The conductor over two nodes of a real Slurm: warned, queued again, done when the run is."""

import json
import sys
import time
from pathlib import Path

import pytest

from pipeline.track.folder import read_probes, update_run_info
from pipeline.track.journal import read_journal
from pipeline.track.jsonl import JsonLinesWriter
from tests.probe_data import write_run, write_ssv2
from tests.running import wait_until
from tests.slurm_cluster import LIMIT_SECONDS, ROOT, running_cluster, skip_or_fail_without_slurm

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(4 * LIMIT_SECONDS)]
SITE = f"""
python: {sys.executable}
gpus_per_node: 0
ranks_per_node: 1
cpus_per_rank: 2
time: "60:00"
grace_seconds: 120
environment: {{OMP_NUM_THREADS: "1"}}
slurm: {{partition: chain}}
"""
TASK = """
name: squares
data: {{kind: ssv2, videos: {folder}/set/videos, annotations: {folder}/set/labels}}
clip: {{frames: 4, fps: 4.0, resolution: 32, views: 1}}
linear: {{learning_rates: [0.01], epochs: 2}}
"""


def done(run: Path) -> list[str]:
    return [entry.event for entry in read_journal(run) if entry.event == "done"]


def note_event(run: Path, **fields: object) -> None:
    writer = JsonLinesWriter(run / "events.jsonl")
    writer.write({"time": time.time(), **fields})
    writer.close()


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that goes on, as far as its events tell."""
    write_ssv2(tmp_path / "set", train=9, validation=6)
    run = write_run(tmp_path, (0, 3, 6))
    update_run_info(run, {"run_id": "r"})
    note_event(run, event="start", step=0)
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    probes = [{"task": str(tmp_path / "task.yaml"), "heads": ["linear"]}]
    asked = {"probes": probes, "poll_seconds": 0.5, "retry_seconds": 0.5}
    (run / "conduct.yaml").write_text(json.dumps(asked))
    (tmp_path / "site.yaml").write_text(SITE)
    return run


def test_the_conductor_works_on_two_nodes_and_is_warned_requeued_and_done(run, tmp_path):
    skip_or_fail_without_slurm()
    words = ["--kind", "conduct", "--nodes", "2", "--", str(run)]
    with running_cluster() as cluster:
        command = [sys.executable, "-m", "tests.workers.launches", json.dumps({"it": words})]
        told = cluster.run("env", f"PYTHONPATH={ROOT}", *command, cwd=tmp_path)
        job = json.loads(told)["it"]
        wait_until(lambda: len(done(run)) >= 1, "something is done", LIMIT_SECONDS)
        cluster.run("scancel", "--batch", "--signal=USR2", job)
        cluster.wait_for(job, "RUNNING", restarts=1)
        wait_until(lambda: len(read_probes(run)) >= 3, "all is probed", LIMIT_SECONDS)
        note_event(run, event="end", step=6, reason="all stages are done")
        assert cluster.wait_for_end(job)["JobState"] == "COMPLETED"
    log = next((run / "jobs").glob("conduct-*.out")).read_text()
    assert "SIGUSR2 was received" in log
    assert ": back into the queue" in log
    assert log.count("runs on 2 of 2 nodes") == 2
    assert sorted(score.step for score in read_probes(run)) == [0, 3, 6]
