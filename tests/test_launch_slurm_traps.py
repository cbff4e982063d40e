"""Traps of signals, exit codes and requeues, on a real Slurm with ranks that need no torch.

All jobs are submitted at once and looked at one after the other, so that waiting costs once.
"""

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.job import JobSpec
from launch.site import Site, SlurmSite
from launch.slurm import render
from tests.slurm_cluster import (
    LIMIT_SECONDS,
    ROOT,
    Cluster,
    running_cluster,
    skip_or_fail_without_slurm,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2 * LIMIT_SECONDS)]
SAVE_SECONDS = 33
"""Longer than the 30 s that torchrun's agent leaves its ranks."""


@dataclass(frozen=True, kw_only=True)
class Toys:
    """The jobs of this file, by name."""

    cluster: Cluster
    folder: Path
    ids: dict[str, str]

    def log(self, name: str) -> str:
        return next((self.folder / name / "jobs").glob("*.out")).read_text()

    def wait_for_log(self, name: str, words: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not any(
            words in log.read_text() for log in (self.folder / name / "jobs").glob("*.out")
        ):
            assert time.monotonic() < deadline, f"{name} never says {words!r}"
            time.sleep(0.2)

    def end(self, name: str) -> tuple[str, str]:
        """The job's last state and exit code."""
        shown = self.cluster.wait_for_end(self.ids[name])
        return shown["JobState"], shown["ExitCode"].split(":")[0]

    def starts(self, name: str) -> int:
        return len(set(re.findall(r"start (\d+)\] runs on", self.log(name))))

    def submit(self, name: str, *command: str, preflight: tuple[str, ...] = (), **changes) -> None:
        """The rendered script with another command, as a person who edits it would submit it."""
        partition = changes.pop("partition", "toys")
        slurm = {"partition": partition, "exclusive": False, "max_failures": 1}
        slurm |= {"launcher": changes.pop("launcher", "srun"), "extra": changes.pop("extra", ())}
        edits = {"lost_seconds=120": "lost_seconds=3", **changes.pop("edits", {})}
        after = changes.pop("after", ())
        site = Site(
            python=sys.executable, gpus_per_node=0, cpus_per_rank=1, preflight=False,
            slurm=SlurmSite(**slurm),
        )  # fmt: skip
        run_dir = self.folder / name
        (run_dir / "jobs").mkdir(parents=True)
        settings = {"nodes": 2, "ranks_per_node": 1, "environment": {"PYTHONPATH": str(ROOT)}}
        job = JobSpec(
            name=name, argv=("toy",), work_dir=ROOT, run_dir=run_dir,
            **{"kind": "train", **settings, **changes},
        )  # fmt: skip
        words = " ".join([sys.executable, "-m", "tests.workers.slurm_rank", *command])
        text = render(job, site, after=after)
        text = re.sub(r"(?m)^command=.*$", f"command=({words})", text)
        for old, new in edits.items():
            assert old in text
            text = text.replace(old, new)
        if preflight:
            checks = " ".join([sys.executable, "-m", "tests.workers.slurm_rank", *preflight])
            text = text.replace("preflight=()", f"preflight=({checks})")
        script = run_dir / "jobs" / "toy.sbatch"
        script.write_text(text)
        self.ids[name] = self.cluster.sbatch(script)


def submit_more(toys: Toys) -> None:
    """Jobs of one node that are looked at when they have ended."""
    folder = toys.folder
    wait = {"after": (f"afterok:{toys.ids['warned']}",)}
    toys.submit("follower", "fine", nodes=1, extra=("--export=NONE",), **wait)
    toys.submit("beside", "save", "0", f"{folder}/beside", nodes=1, kind="probe")
    (folder / "beside" / "stop").touch()
    for name in ("uncounted", "limited", "stopped"):
        toys.submit(name, name, f"{folder}/{name}", nodes=1)
    toys.submit("overdue", "save", "1", f"{folder}/overdue", nodes=1)
    # The moment between the ranks' end and the requeue, made long enough to be met.
    late = {"  tidy\n  put_back": "  sleep 20 & wait $!\n  put_back"}
    toys.submit("late", "save", "0", f"{folder}/late", nodes=1, edits=late)


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Iterator[Toys]:
    skip_or_fail_without_slurm()
    folder = tmp_path_factory.mktemp("toys")
    with running_cluster() as cluster:
        toys = Toys(cluster=cluster, folder=folder, ids={})
        save = ("save", str(SAVE_SECONDS))
        toys.submit("agent", *save, f"{folder}/agent", launcher="torchrun", ranks_per_node=2)
        toys.submit("evicted", "save", "4", f"{folder}/evicted", nodes=1, partition="low")
        toys.submit("crash", "crash")
        for code in (78, 93):
            toys.submit(f"code-{code}", "code", str(code), f"{folder}/code-{code}")
        toys.submit("agent-78", "code", "78", f"{folder}/agent-78", launcher="torchrun",
                    nodes=1, ranks_per_node=2)  # fmt: skip
        toys.submit("lock", "lock", nodes=1)
        toys.submit(
            "bad-node", "fine", nodes=1, preflight=("check", "node8,node9"), partition="chain"
        )
        toys.submit("warned", "save", "0", f"{folder}/warned")
        toys.submit("cancelled", "save", "2", f"{folder}/cancelled")
        submit_more(toys)
        # Now, since Slurm looks for what is out of time every 30 s.
        toys.wait_for_log("overdue", "rank 0, start 0: listens")
        cluster.run("scontrol", "update", f"JobId={toys.ids['overdue']}", "EndTime=now")
        # Now, since its save is what takes longest here.
        toys.wait_for_log("agent", "rank 3, start 0: listens")
        cluster.run("scancel", "--batch", "--signal=USR2", toys.ids["agent"])
        yield toys


def test_a_warning_is_handed_to_the_ranks_which_save_and_go_on_in_the_same_log(toys):
    toys.wait_for_log("warned", "rank 1, start 0: listens")
    toys.cluster.run("scancel", "--batch", "--signal=USR2", toys.ids["warned"])
    assert toys.end("warned") == ("COMPLETED", "0")
    log = toys.log("warned")
    for rank in (0, 1):
        assert f"{rank}: rank {rank}, start 0: asked by SIGUSR2" in log
    # Without --open-mode=append the second start would have wiped the first one's lines.
    assert "saved at step 1: back into the queue" in log
    assert "rank 0, start 1" in log
    assert not (toys.folder / "warned/jobs" / f"{toys.ids['warned']}.failures").exists()


def test_a_cancelled_job_lets_its_ranks_save_though_slurm_ends_srun_too(toys):
    toys.wait_for_log("cancelled", "rank 1, start 0: listens")
    toys.cluster.run("scancel", toys.ids["cancelled"])
    assert toys.end("cancelled")[0] == "CANCELLED"
    toys.wait_for_log("cancelled", "ended with 75")
    log = toys.log("cancelled")
    assert log.count(": saved") == 2
    assert toys.starts("cancelled") == 1


def test_a_preempted_job_saves_within_its_grace_and_is_queued_again(toys):
    toys.wait_for_log("evicted", "rank 0, start 0: listens")
    urgent = toys.cluster.run(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null",
        "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    assert toys.cluster.wait_for_end(urgent)["JobState"] == "COMPLETED"
    assert toys.end("evicted") == ("COMPLETED", "0")
    log = toys.log("evicted")
    assert "asked by SIGTERM" in log
    assert "rank 0, start 0: saved" in log
    assert toys.starts("evicted") == 2


def test_the_highest_exit_code_of_the_ranks_does_not_hide_a_crash_loop(toys):
    state, code = toys.end("crash")
    assert (state, code) != ("COMPLETED", "0")
    log = toys.log("crash")
    assert "failure 1 of 1 since step 0" in log
    assert "giving up" in log
    assert toys.starts("crash") == 2


@pytest.mark.parametrize("code", [78, 93])
def test_what_no_retry_can_help_is_not_started_again_although_another_rank_was_killed(toys, code):
    assert toys.end(f"code-{code}") == ("FAILED", str(code))
    assert toys.starts(f"code-{code}") == 1
    assert f"ended with {128 + 9}" in toys.log(f"code-{code}"), "srun told the highest"


def test_a_stale_lock_of_a_killed_build_is_not_met_by_the_next_start(toys):
    assert toys.end("lock") == ("COMPLETED", "0")
    told = re.findall(r"lock (\S+) is there: (\w+)", toys.log("lock"))
    assert [there for _, there in told] == ["False", "False"]
    assert len({path for path, _ in told}) == 2, "a folder of each start alone"
    assert not [path for path, _ in told if Path(path).parents[1].exists()], "none is left behind"


def test_no_shell_stands_between_slurm_and_a_rank(toys):
    toys.end("lock")
    assert "runs below slurmstepd" in toys.log("lock")


def test_a_node_that_fails_the_checks_is_left_out_of_all_further_starts(toys):
    assert toys.end("bad-node") == ("COMPLETED", "0")
    log = toys.log("bad-node")
    assert re.findall(r"runs on 1 of 1 nodes: (\w+)", log) == ["node8", "node9", "node10"]
    assert re.findall(r"bad: (\w+); queued again", log) == ["node8", "node9"]
    assert "failure" not in log, "the node's fault is not the run's"


def test_torchrun_tells_the_code_of_the_rank_that_failed(toys):
    assert toys.end("agent-78") == ("FAILED", "78")
    assert "ended with 78" in toys.log("agent-78")


def test_a_job_that_waits_for_a_run_does_not_start_between_its_starts(toys):
    assert toys.end("warned") == ("COMPLETED", "0")
    assert toys.end("follower") == ("COMPLETED", "0")
    first, second = (toys.cluster.show(toys.ids[name]) for name in ("warned", "follower"))
    assert first["EndTime"] <= second["StartTime"]


def test_tasks_see_what_the_script_sets_although_the_site_exports_nothing(toys):
    toys.end("follower")
    assert re.search(r"rank 0, start 0: meets at node\d", toys.log("follower"))


def test_work_beside_a_run_is_warned_and_goes_on_although_the_run_was_stopped(toys):
    toys.wait_for_log("beside", "rank 0, start 0: listens")
    toys.cluster.run("scancel", "--batch", "--signal=USR2", toys.ids["beside"])
    assert toys.end("beside") == ("COMPLETED", "0")
    assert "asked by SIGUSR2" in toys.log("beside")
    assert toys.starts("beside") == 2


def test_a_cancelled_job_stays_cancelled_although_it_was_about_to_queue_again(toys):
    toys.wait_for_log("late", "rank 0, start 0: listens")
    toys.cluster.run("scancel", "--batch", "--signal=USR2", toys.ids["late"])
    toys.wait_for_log("late", "back into the queue")
    toys.cluster.run("scancel", toys.ids["late"])
    toys.wait_for_log("late", "ended by Slurm")
    assert toys.end("late")[0] == "CANCELLED"
    time.sleep(1)
    assert toys.end("late")[0] == "CANCELLED"
    assert toys.starts("late") == 1


def test_a_run_that_is_out_of_time_is_queued_again_though_slurm_does_not(toys):
    assert toys.end("overdue") == ("COMPLETED", "0")
    log = toys.log("overdue")
    assert "DUE TO TIME LIMIT" in log
    assert "out of time: grace_seconds is too little" in log
    assert "saved at step 1: back into the queue" in log
    assert toys.starts("overdue") == 2


@pytest.mark.parametrize(
    ("name", "code", "starts", "says"),
    [
        ("uncounted", "1", 1, "failures cannot be counted"),
        ("limited", "75", 1, "stopped by stop.at or stop.max_hours"),
        ("stopped", "75", 1, "stopped by `jepa stop` before it began"),
    ],
)
def test_a_job_that_shall_not_come_back_does_not(toys, name, code, starts, says):
    assert toys.end(name) == ("FAILED", code)
    assert says in toys.log(name)
    assert toys.starts(name) == starts


def test_torchrun_hands_on_a_warning_waits_for_a_long_save_and_tells_75(toys):
    """The last one here: meanwhile its save has gone on."""
    assert toys.end("agent") == ("COMPLETED", "0")
    log = toys.log("agent")
    assert log.count("start 0: saved") == 4, "nobody was killed after 30 s"
    assert "ended with 75" in log
    assert "saved at step 1: back into the queue" in log
