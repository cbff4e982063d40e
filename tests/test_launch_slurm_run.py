"""Real training on a real Slurm: submitted, warned, requeued, robbed of a node, cancelled, chained.

Jobs are submitted at once, so that each waits while the others compute; the one without an end is
cancelled first, since it takes a core from all others.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.checkpoint import layout
from pipeline.track.folder import read_probes
from pipeline.track.metrics import read_all_metrics, read_events, read_metrics
from tests.running import long_stage, reasons, write_config
from tests.shards import write_dataset
from tests.slurm_cluster import (
    LIMIT_SECONDS,
    ROOT,
    Cluster,
    running_cluster,
    skip_or_fail_without_slurm,
)
from tests.test_decode_frames import grid_video

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * LIMIT_SECONDS)]
STEPS = 80
PAIR = ("--nodes", 2, "--min-nodes", 1, "--set", "slurm.partition=pair")
JEPA = (sys.executable, "-m", "pipeline.cli")
TASK = """
name: squares
data: {{kind: csv, train: {folder}/train.csv, validation: {folder}/val.csv}}
clip: {{frames: 4, fps: 4.0, resolution: 32, views: 1}}
linear: {{learning_rates: [0.01], epochs: 2}}
"""


def steps_of_each_start(run_dir: Path) -> list[int]:
    """How many steps each start of a run has taken."""
    events = [e.time for e in read_events(run_dir) if e.name in ("start", "resume")]
    times = [step.time for step in read_all_metrics(run_dir)]
    ends = [*events[1:], float("inf")] if events else []
    return [
        sum(begin <= time < end for time in times) for begin, end in zip(events, ends, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Jobs by name, and the folder of their runs."""

    cluster: Cluster
    folder: Path
    ids: dict[str, str]

    def launch(self, **jobs: list) -> None:
        """`jepa launch slurm` on the login node, once for each job."""
        words = {name: [str(word) for word in words] for name, words in jobs.items()}
        command = [sys.executable, "-m", "tests.workers.launches", json.dumps(words)]
        told = self.cluster.run("env", f"PYTHONPATH={ROOT}", *command, cwd=self.folder)
        self.ids.update(json.loads(told))

    def log(self, run: str) -> str:
        return next((self.folder / run / "jobs").glob(f"{run}-*.out")).read_text()

    def maybe_log(self, run: str) -> str:
        logs = (self.folder / run / "jobs").glob(f"{run}-*.out")
        return "".join(log.read_text() for log in logs)

    def status(self, run: str) -> dict:
        words = [*JEPA, "status", self.folder / run, "--json"]
        return json.loads(self.cluster.run(*words, cwd=self.folder))

    def wait_until(self, what, words: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not what():
            assert time.monotonic() < deadline, f"never: {words}"
            time.sleep(0.1)

    def wait_for_steps(self, run: str, *, starts: int) -> None:
        """Until that many starts have taken steps, three in the last one."""

        def are_taken() -> bool:
            taken = steps_of_each_start(self.folder / run)
            return len(taken) >= starts and taken[-1] >= 3

        self.wait_until(are_taken, f"{run} takes steps in its start {starts}")

    def wait_for_step(self, run: str, step: int) -> None:
        def is_there() -> bool:
            steps = read_metrics(self.folder / run)
            return bool(steps) and steps[-1].report.step >= step

        self.wait_until(is_there, f"{run} at step {step}")


def site_file(folder: Path) -> None:
    (folder / "site.yaml").write_text(f"""
name: throw-away
python: {sys.executable}
gpus_per_node: 0
ranks_per_node: 1
cpus_per_rank: 2
time: "20:00"
grace_seconds: 60
preflight: false
environment: {{OMP_NUM_THREADS: "1"}}
slurm: {{partition: toys}}
""")


def write_videos(folder: Path) -> None:
    """A few videos to prepare and to probe on, with lists of their labels."""
    for part in ("train", "val"):
        (folder / "videos" / part).mkdir(parents=True)
        rows = []
        for number in range(4):
            path = folder / "videos" / part / f"v{number}.mp4"
            path.write_bytes(grid_video(num_frames=16 + number))
            rows.append(f"{path} {number % 2}")
        (folder / "videos" / f"{part}.csv").write_text("\n".join(rows) + "\n")
    (folder / "task.yaml").write_text(TASK.format(folder=folder / "videos"))


def jobs_of(folder: Path) -> dict[str, list]:
    """Words of every job; each name is a run's, or of what is done before and after it."""
    chain = ["--set", "slurm.partition=chain"]
    prep = ["--kind", "prep", "--each", "train", "--each", "val", *chain]
    probe = ["--kind", "probe", "--each", "0", "--each", "last", *chain]
    task = ["--task", folder / "task.yaml", "--head", "linear", "--steps", "{}"]
    return {
        "prep": [*prep, "--", "run", "videos/{}", "--out", "prepared/{}"],
        "chained": ["chained.yaml", "--after", "@prep", *chain],
        "probe": [*probe, "--after", "@chained", "--", "chained", *task],
        "even": ["even.yaml", "--nodes", 2, "--set", "preflight=true"],
        "gone": ["gone.yaml"],
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    skip_or_fail_without_slurm()
    folder = tmp_path_factory.mktemp("runs")
    site_file(folder)
    write_dataset(folder / "data", 24)
    write_videos(folder)
    plain = {"data": {"workers": 0}, "checkpoint": {"every_steps": 10}}
    for name in ("even", "torn"):
        write_config(folder, name, stages=long_stage(STEPS), **plain)
    write_config(folder, "gone", stages=long_stage(), **plain)
    data = {"sources": [{"path": str(folder / "prepared/train")}], "workers": 0}
    write_config(folder, "chained", data=data, global_batch=4, stages=long_stage(2))
    with running_cluster() as cluster:
        runs = Runs(cluster=cluster, folder=folder, ids={})
        runs.launch(**jobs_of(folder))
        # Now, while it imports.
        steps = ("squeue", "--noheader", "--steps", "--format=%j", f"--jobs={runs.ids['gone']}")
        runs.wait_until(lambda: "ranks" in cluster.run(*steps), "its rank is started")
        cluster.run("scancel", "--batch", "--signal=USR2", runs.ids["gone"])
        assert read_metrics(folder / "gone") == ()
        yield runs


def test_a_queued_job_is_seen_by_status_before_the_run_has_said_a_word(runs):
    told = runs.status("chained")
    job = told["jobs"][0]
    assert (told["state"], job["state"], job["id"]) == (
        "not started",
        "queued",
        runs.ids["chained"],
    )
    assert "Dependency" in job["detail"]
    assert job["stop"] == f"scancel {job['id']}"
    stop = f"{' '.join(JEPA)} stop chained 2>&1 || true"
    assert f"`{job['stop']}` takes that back" in runs.cluster.run(
        "bash", "-c", stop, cwd=runs.folder
    )


def test_a_warning_that_comes_while_python_imports_is_kept_until_it_can_be_obeyed(runs):
    runs.cluster.wait_for(runs.ids["gone"], "RUNNING", restarts=1)
    log = runs.log("gone")
    assert "asked to save: the time limit is near" in log
    assert "ended with 75" in log
    assert ": back into the queue" in log
    assert reasons(runs.folder / "gone", "fault") == []


def test_a_cancelled_run_is_stopped_in_good_order(runs):
    runs.wait_for_step("gone", 3)
    assert runs.status("gone")["jobs"][0]["state"] == "running"
    runs.cluster.run("scancel", runs.ids["gone"])
    assert runs.cluster.wait_for_end(runs.ids["gone"])["JobState"] == "CANCELLED"
    runs.wait_until(lambda: runs.status("gone")["state"] == "stopped", "the run has stopped")
    told = runs.status("gone")
    assert told["last_good_checkpoint"] == told["step"], "nothing is lost"
    assert told["jobs"][0]["state"] == "cancelled"


def test_a_run_that_is_warned_requeued_and_robbed_of_a_node_comes_back_each_time(runs):
    # Not with the others: it has so many steps only, and on a busy machine none is waited for.
    runs.launch(torn=["torn.yaml", *PAIR])
    job = runs.ids["torn"]
    runs.wait_for_steps("torn", starts=1)
    runs.cluster.run("scancel", "--batch", "--signal=USR2", job)
    runs.wait_for_steps("torn", starts=2)
    runs.cluster.run("scontrol", "requeue", job)
    runs.wait_for_steps("torn", starts=3)
    runs.cluster.slurm_local("fail", "node2")
    runs.cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=power")
    assert runs.cluster.wait_for_end(job)["JobState"] == "COMPLETED"
    info = json.loads((runs.folder / "torn/run.json").read_text())
    assert [start["world_size"] for start in info["starts"]] == [2, 2, 2, 1]
    assert [start.get("ended") for start in info["starts"]][:2] == ["stopped", "stopped"]
    log = runs.log("torn")
    assert log.count("] runs on ") == 4
    assert "lost 1 node(s): goes on with 1 or more" in log
    told = reasons(runs.folder / "torn", "stop")
    assert told[:2] == ["SIGUSR2 was received", "SIGTERM was received"]


def test_two_nodes_train_under_zero_3_after_the_checks_of_both(runs):
    assert runs.cluster.wait_for_end(runs.ids["even"])["JobState"] == "COMPLETED"
    info = json.loads((runs.folder / "even/run.json").read_text())
    assert info["world_size"] == 2
    assert layout.list_commits(runs.folder / "even")[-1].step == STEPS
    log = runs.log("even")
    assert "Ready. Checked in" in log
    assert "runs on 2 of 2 nodes" in log
    told = runs.status("even")
    assert (told["state"], told["jobs"][0]["state"]) == ("finished", "finished")


def test_losses_after_warning_and_requeue_are_bit_equal_and_those_after_the_loss_of_a_node_close(
    runs,
):
    for job in ("torn", "even"):
        runs.cluster.wait_for_end(runs.ids[job])
    even, torn = (
        {step.report.step: step.report.loss for step in read_metrics(runs.folder / run)}
        for run in ("even", "torn")
    )
    assert sorted(torn) == sorted(even) == list(range(1, STEPS + 1))
    last = [e.step for e in read_events(runs.folder / "torn") if e.name == "resume"][-1]
    assert last >= 3
    assert {s: torn[s].hex() for s in torn if s <= last} == {
        s: even[s].hex() for s in even if s <= last
    }
    assert [torn[step] for step in range(last + 1, STEPS + 1)] == pytest.approx(
        [even[step] for step in range(last + 1, STEPS + 1)], rel=1e-3
    )


def test_an_array_of_preparations_is_followed_by_training_and_by_an_array_of_probes(runs):
    for job in ("prep", "chained", "probe"):
        assert runs.cluster.wait_for_end(runs.ids[job])["JobState"] == "COMPLETED", job
    for part in ("train", "val"):
        assert (runs.folder / "prepared" / part / "manifest.json").is_file()
    commits = layout.list_commits(runs.folder / "chained")
    assert [commit.step for commit in commits] == [0, 2]
    runs.wait_until(lambda: len(read_probes(runs.folder / "chained")) == 2, "both probes")
    assert sorted(score.step for score in read_probes(runs.folder / "chained")) == [0, 2]


@pytest.mark.slow
def test_preparation_spreads_over_nodes_by_ray_and_leaves_no_process_of_it(runs):
    words = ["run", "videos/train", "--out", "spread"]
    runs.launch(spread=["--kind", "prep", "--name", "spread", "--nodes", 2, "--", *words])
    assert runs.cluster.wait_for_end(runs.ids["spread"])["JobState"] == "COMPLETED"
    assert (runs.folder / "spread/manifest.json").read_bytes() == (
        runs.folder / "prepared/train/manifest.json"
    ).read_bytes()
    log = next((runs.folder / "runs/spread/jobs").glob("*.out")).read_text()
    assert "Running command on head node" in log
    token = next((runs.folder / "runs/spread/jobs").glob("*.token"))
    assert token.stat().st_mode & 0o077 == 0
