"""A real Slurm of several nodes on this machine, thrown away when the tests are over."""

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("slurm_local.sh")
# Of many times what it takes on a quiet machine: several suites may share two cores.
LIMIT_SECONDS = 420
# One partition each for what is lost, preempted or trained, so that none disturbs another.
PARTITIONS = """PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=pair Nodes=node[1-2] PriorityTier=5
PartitionName=toys Nodes=node[3-6] PriorityTier=5
PartitionName=low Nodes=node7 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=node7 PriorityTier=9
PartitionName=chain Nodes=node[8-10] PriorityTier=5"""


def missing() -> str:
    """What keeps a Slurm from being started here; empty if nothing does."""
    if os.getuid() != 0:
        return "root"
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "ip")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in programs if shutil.which(name, path=path) is None]
    return f"{', '.join(absent)} (slurmctld slurmd slurm-client munge iproute2)" if absent else ""


def skip_or_fail_without_slurm() -> None:
    """Where continuous integration has installed the packages, a skip would hide a fault."""
    lacking = missing()
    if lacking and os.environ.get("JEPA_REQUIRE_SLURM"):
        pytest.fail(f"JEPA_REQUIRE_SLURM is set, but there is no {lacking}")
    if lacking:
        pytest.skip(f"starting a Slurm needs {lacking}")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster of one test session."""

    name: str
    env: dict[str, str]

    def slurm_local(self, *words: str, seconds: float = 120) -> str:
        """Runs slurm_local.sh; its output."""
        done = subprocess.run(
            ["bash", str(SCRIPT), *words],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    def run(self, *command: object, cwd: Path = ROOT) -> str:
        """Runs a command on the login node; its standard output."""
        words = ["env", f"--chdir={cwd}", *map(str, command)]
        return self.slurm_local("run", *words)

    def sbatch(self, script: Path, *options: str) -> str:
        """Submits a file as a person does; the job's number."""
        return self.run("sbatch", "--parsable", *options, script, cwd=script.parent).strip()

    def show(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        line = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait_for(self, job: str, *states: str, restarts: int = 0) -> dict[str, str]:
        """Waits until a job is in one of some states, after a number of restarts."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            shown = self.show(job)
            if shown["JobState"] in states and int(shown["Restarts"]) >= restarts:
                return shown
            assert time.monotonic() < deadline, f"job {job} is never {states}: {shown}"
            time.sleep(0.3)

    def wait_for_end(self, job: str) -> dict[str, str]:
        """Waits until a job is over for good."""
        return self.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@contextmanager
def running_cluster(**changes: str) -> Iterator[Cluster]:
    """Starts a cluster of a name of its own and stops it, whatever happens in between.

    `changes` are settings of slurm_local.sh, without their common beginning.
    """
    name = f"jepa{uuid.uuid4().hex[:8]}"
    settings = {
        "SLURM_LOCAL_NAME": name,
        "SLURM_LOCAL_NODES": "10",
        "SLURM_LOCAL_CPUS": "8",
        "SLURM_LOCAL_EXTRA": PARTITIONS,
        **{f"SLURM_LOCAL_{key}": value for key, value in changes.items()},
    }
    cluster = Cluster(name=name, env={**os.environ, **settings, "OMP_NUM_THREADS": "1"})
    try:
        cluster.slurm_local("start")
        yield cluster
    finally:
        cluster.slurm_local("stop")
