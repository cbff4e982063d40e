"""Seconds from `sbatch` to the first step, from a requeue to the first resumed one, of the checks.

On a throw-away Slurm of this machine: two nodes share its cores, so imports take as long as they do
here twice over. What the launcher adds itself is small and is told apart.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.result import print_table, spread, write_result
from pipeline.errors import UsageError
from pipeline.track.metrics import read_all_metrics
from tests.running import long_stage, write_config
from tests.shards import write_dataset
from tests.slurm_cluster import Cluster, missing, running_cluster

_ROUNDS = 3
_LIMIT_SECONDS = 300.0
_SITE = """
python: {python}
gpus_per_node: 0
ranks_per_node: 1
cpus_per_rank: 2
time: "20:00"
grace_seconds: 60
environment: {{OMP_NUM_THREADS: "1"}}
slurm: {{partition: toys}}
"""


def main() -> int:
    """`python -m benchmarks.launch [ROUNDS]`: needs root and Debian's packages of Slurm."""
    lacking = missing()
    if lacking:
        raise UsageError(f"starting a Slurm needs {lacking}")
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else _ROUNDS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_dataset(folder / "data", 24)
        (folder / "site.yaml").write_text(_SITE.format(python=sys.executable))
        with running_cluster() as cluster:
            measured = [_round(cluster, folder, number) for number in range(rounds)]
    figures = {phase: spread([one[phase] for one in measured]) for phase in measured[0]}
    rows = [(phase, s["median"], s["min"], s["max"]) for phase, s in figures.items()]
    print_table("Two nodes on a local Slurm, seconds", ("phase", "median", "min", "max"), rows)
    details = {"rounds": rounds, "nodes": 2, "ranks_per_node": 1}
    print(f"written to {write_result('launch', figures, details)}")
    return 0


def _round(cluster: Cluster, folder: Path, number: int) -> dict[str, float]:
    name = f"round{number}"
    run = folder / name
    write_config(folder, name, stages=long_stage(), data={"workers": 0})
    begin = time.time()
    jepa = (sys.executable, "-m", "pipeline.cli", "launch", "slurm", f"{name}.yaml", "--nodes", 2)
    told = json.loads(cluster.run(*jepa, "--json", cwd=folder))
    submitted = time.time()
    _until(lambda: bool(read_all_metrics(run)))
    first = read_all_metrics(run)[0].time
    cluster.run("scancel", "--batch", "--signal=USR2", told["id"])
    warned = time.time()
    # While the run saves, steps go on; those after it come from the second start.
    _until(lambda: int(cluster.show(told["id"])["Restarts"]) >= 1)
    requeued, before = time.time(), len(read_all_metrics(run))
    _until(lambda: cluster.show(told["id"])["JobState"] == "RUNNING")
    running = time.time()
    _until(lambda: len(read_all_metrics(run)) > before)
    resumed = read_all_metrics(run)[before].time
    cluster.run("scancel", told["id"])
    cluster.wait_for_end(told["id"])
    log = next((run / "jobs").glob("*.out")).read_text()
    checks = [float(seconds) for seconds in re.findall(r"Checked in ([\d.]+) s", log)]
    return {
        "jepa launch": submitted - begin,
        "sbatch to first step": first - submitted,
        "warning to requeue": requeued - warned,
        "requeue to running (Slurm)": running - requeued,
        "requeue to first resumed step": resumed - requeued,
        "checks themselves": checks[0],
    }


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError("the job did not get so far")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
