"""The commands that a submission prints are ones that kubectl takes, and do what they promise."""

import os
import subprocess
from pathlib import Path

import pytest

from launch.job import JobSpec
from launch.k8s import objects
from launch.k8s_submit import pause_command, record_of
from launch.site import KubernetesSite, Site
from pipeline.track.jobs import ask
from tests.k8s_api import GROUPS, serving
from tests.k8s_objects import NO_KUBECTL, Object, kubectl_is_new
from tests.test_launch_k8s_render import a_job

pytestmark = pytest.mark.skipif(not kubectl_is_new(), reason=NO_KUBECTL)
MINE = "app.kubernetes.io/instance=a"
ARRAY = {"kind": "probe", "argv": ("probe", "--steps", "{}"), "each": ("1", "2"), "nodes": 1}


def held(*paths: str) -> dict[str, Object]:
    """Objects that a cluster holds, by kind and name."""
    kinds = {plural: (version, kind) for version, (kind, plural) in GROUPS.items()}
    kinds["pods"] = ("v1", "Pod")
    found = {}
    for path in paths:
        plural, name = path.split("/")
        version, kind = kinds[plural]
        metadata = {"name": name, "namespace": "jepa", "uid": f"uid-{name}"}
        spec = {"containers": [{"name": "train"}]} if plural == "pods" else {}
        found[path] = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
    return found


def run(command: str, folder: Path) -> str:
    """As a person runs what was printed."""
    env = {**os.environ, "KUBECONFIG": str(folder / "config"), "HOME": str(folder)}
    done = subprocess.run(
        ["bash", "-c", command], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def made(job: JobSpec, queue: str | None) -> list[Object]:
    return objects(job, Site(gpus_per_node=0, k8s=KubernetesSite(queue=queue)))


def test_watch_and_log_ask_for_the_job_and_its_pods(tmp_path):
    record = record_of(a_job(), made(a_job(), None), Path("/x.yaml"))
    with serving(held("jobsets/a", "pods/a-node-0-0-x"), tmp_path) as api:
        shown = run(record.watch, tmp_path)
        assert "jobset.jobset.x-k8s.io/a" in shown
        assert "pod/a-node-0-0-x" in shown
        assert "step 1" in run(record.log, tmp_path)
    assert ("GET", "jobsets", MINE) in api.asked
    assert api.asked.count(("GET", "pods", MINE)) == 2


def test_what_kueue_has_admitted_is_paused_by_its_workload(tmp_path):
    """Kueue takes back at once what is suspended behind its back."""
    with serving(held("jobsets/a", "workloads/w"), tmp_path) as api:
        run(pause_command(made(a_job(), "gpu")), tmp_path)
    assert ("GET", "workloads", "kueue.x-k8s.io/job-uid=uid-a") in api.asked
    assert api.asked[-1] == ("PATCH", "workloads/w", '{"spec":{"active":false}}')


def test_without_kueue_the_job_itself_is_paused(tmp_path):
    with serving(held("jobsets/a"), tmp_path) as api:
        run(pause_command(made(a_job(), None)), tmp_path)
    assert api.asked[-1] == ("PATCH", "jobsets/a", '{"spec":{"suspend":true}}')


def test_all_jobs_of_an_array_are_seen_and_stopped(tmp_path, monkeypatch):
    job = a_job(**ARRAY)
    record = record_of(job, made(job, None), Path("/x.yaml"))
    assert record.id == "rayjob/a-0 to a-1"
    found = held("rayjobs/a-0", "rayjobs/a-1")
    found["rayjobs/a-0"]["status"] = {"jobDeploymentStatus": "Complete"}
    found["rayjobs/a-1"]["status"] = {"jobDeploymentStatus": "Running"}
    with serving(found, tmp_path):
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        told = ask(record)
        assert (told.state, told.detail) == ("running", "1 finished, 1 running")
        assert "a-0" in run(record.watch, tmp_path)
        run(record.stop, tmp_path)
        assert found == {}
        assert ask(record).state == "unknown"
