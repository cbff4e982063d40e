"""Ray is confined: loopback only, a token for everybody, and nothing of others is shut down."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from pipeline import cluster
from pipeline.errors import UsageError

JOIN = """
import sys
from pipeline.cluster import local_ray
from pipeline.errors import JepaError
try:
    with local_ray(address=sys.argv[1]) as ray:
        print("joined", ray.get(ray.remote(lambda: 41 + 1).remote()))
except JepaError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    with cluster.local_ray(num_cpus=1) as module:
        yield module


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_every_port_of_a_local_cluster_is_on_the_loopback(ray: ModuleType) -> None:
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    addresses = [
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(addresses) >= 3
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_block_inside_another_uses_its_ray_and_leaves_it_running(ray: ModuleType) -> None:
    with cluster.local_ray() as inner:
        assert inner is ray
    assert ray.is_initialized()


def test_who_has_the_token_can_join_and_nobody_else(ray: ModuleType) -> None:
    address = ray.get_runtime_context().gcs_address
    token = os.environ["RAY_AUTH_TOKEN"]
    assert run(JOIN, address, RAY_AUTH_TOKEN=token) == "joined 42"
    refused = run(JOIN, address, RAY_AUTH_TOKEN="0" * 64)
    assert refused.startswith("UsageError no Ray cluster could be joined")
    assert ray.get(ray.remote(lambda: 2).remote()) == 2


def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    answer = run(JOIN, "127.0.0.1:9")
    assert answer.startswith("UsageError no Ray cluster could be joined at 127.0.0.1:9")
    assert run(JOIN, "nonsense").startswith("UsageError no Ray cluster could be joined")


def test_switched_off_authentication_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match="not `token`"), cluster.local_ray():
        pass


def test_a_machine_without_ray_is_told_what_to_install() -> None:
    without = "import sys; sys.modules['ray'] = None\n"
    answer = run(without + JOIN.replace(", error)", ", error.remedy)"), "x:1")
    assert answer == "UsageError pip install 'jepa-pipeline[train]'"


def test_the_environment_is_put_back_and_an_unconfined_ray_is_refused() -> None:
    code = """
import os
before = dict(os.environ)
from pipeline.cluster import local_ray
try:
    with local_ray(address="127.0.0.1:9"):
        pass
except Exception as error:
    print(type(error).__name__, dict(os.environ) == before)
"""
    assert run(code) == "UsageError True"
    assert "JepaError" in run("import ray\n" + code)


def test_what_killed_processes_left_is_removed_and_nothing_of_living_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_TEMPORARY", tmp_path)
    killed, young, foreign = (tmp_path / f"jepa-ray-{name}" for name in ("old", "new", "else"))
    for folder in (killed, young, foreign):
        (folder / "session").mkdir(parents=True)
    for folder in (killed, young):
        (folder / "driver.lock").touch()
    long_ago = time.time() - 3600
    with cluster._own_folder() as living:
        for folder in (killed, foreign, Path(living)):
            os.utime(folder, (long_ago, long_ago))
        with cluster._own_folder() as own:
            left = {path.name for path in tmp_path.iterdir()}
            assert left == {Path(living).name, Path(own).name, young.name, foreign.name}
    assert {path.name for path in tmp_path.iterdir()} == {young.name, foreign.name}
