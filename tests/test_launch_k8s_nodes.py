"""The words of a JobSet's pods on nodes of a real Slurm: other hosts, the pods' own names."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from launch.job import JobSpec
from launch.k8s import objects
from launch.site import KubernetesSite, Site
from tests.k8s_objects import pod_templates
from tests.running import long_stage, write_config
from tests.shards import write_dataset
from tests.slurm_cluster import LIMIT_SECONDS, ROOT, running_cluster, skip_or_fail_without_slurm
from tests.test_launch_k8s_pods import AS_FIRST

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(3 * LIMIT_SECONDS)]
NODES = ("node3", "node4")


def pod_command(config: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Words and variables of the container, with what its volumes hold where it is here."""
    site = Site(
        python=sys.executable, image="i:1", memory_gib=66, nodes=2, gpus_per_node=0,
        environment={"OMP_NUM_THREADS": "1"}, k8s=KubernetesSite(check_seconds=300),
    )  # fmt: skip
    job = JobSpec(
        name="pods", kind="train", argv=("train", str(config), "--or-resume"), work_dir=folder,
        run_dir=folder / "pods", config_path=config, config_text=config.read_text(), nodes=2,
        memory_gib=66, image="i:1", environment=site.environment,
    )  # fmt: skip
    jobset = next(one for one in objects(job, site) if one["kind"] == "JobSet")
    (container,) = pod_templates(jobset)[0]["spec"]["containers"]
    env = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    env |= {"HOME": str(folder), "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", "")}
    env |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    here = {"/etc/jepa/run.yaml": str(config)}
    return [here.get(word, word) for word in container["command"]], env


def test_the_pods_of_a_jobset_meet_by_its_name_and_train(tmp_path):
    skip_or_fail_without_slurm()
    if not AS_FIRST:
        pytest.skip("hosts of their own need namespaces, which are not permitted here")
    write_dataset(tmp_path / "data", 12)
    config = write_config(tmp_path, "pods", stages=long_stage(2))
    command, env = pod_command(config, tmp_path)
    assert env["MASTER_ADDR"] == "pods-node-0-0.pods"
    # A pod has none of the variables of a Slurm step, only its index.
    words = ["env", "-i", *(f"{name}={value}" for name, value in env.items() if value)]
    pod = f'exec {shlex.join(words)} JOB_COMPLETION_INDEX=$SLURM_NODEID "$@"'
    with running_cluster(MODE="net") as cluster:
        hosts = Path(cluster.run("bash", "-c", 'dirname "$SLURM_CONF"').strip()) / "hosts"
        (address,) = {
            line.split()[0] for line in hosts.read_text().splitlines() if NODES[0] in line.split()
        }
        with hosts.open("a") as file:
            file.write(f"{address} {env['MASTER_ADDR']}\n")
        cluster.slurm_local(
            "run", "srun", f"--nodelist={','.join(NODES)}", "--nodes=2", "--ntasks-per-node=1",
            f"--chdir={tmp_path}", "bash", "-c", pod, "pod", *command, seconds=2 * LIMIT_SECONDS,
        )  # fmt: skip
    info = json.loads((tmp_path / "pods/run.json").read_text())
    assert info["world_size"] == 2
    assert len((tmp_path / "pods/metrics.jsonl").read_text().splitlines()) == 2
