"""`jepa check` as processes: alone, on several ranks, with some that are missing or hang."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.preflight.checks.gpus import check_gpus
from launch.preflight.checks.matmul import check_matmul
from launch.preflight.finding import Situation
from pipeline.config.load import resolved_yaml
from pipeline.environment import free_port, read_launch
from pipeline.errors import ExitCode
from tests.plain import tiny_config
from tests.running import finish, jepa
from tests.shards import write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    write_dataset(folder / "data", 6)
    data = {"sources": [{"path": str(folder / "data")}], "workers": 1}
    config = tiny_config(runs_folder=str(folder / "runs"), data=data)
    (folder / "config.yaml").write_text(resolved_yaml(config))
    return folder


def start(folder: Path, *words: object, limit_files: bool = False, **place: object):
    """A process of a job on three nodes n0 to n2, one process each."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env |= {
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "SLURM_STEP_NODELIST": "n[0-2]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
        "WORLD_SIZE": "3",
        **{name: str(value) for name, value in place.items()},
        "JEPA_NODE_NAME": f"n{place['RANK']}",
    }
    module = words[0] if words else "pipeline.cli"
    command = [sys.executable, "-m", str(module)]
    if not words:
        command += ["check", str(folder / "config.yaml"), "global_batch=6", "--at-start"]
        command += ["--json", "--seconds", str(place.get("seconds", 60))]
        command += ["--bad-nodes", str(folder / "bad")]
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_few_files if limit_files else None,  # noqa: PLW1509 - before any thread
    )


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))


def ends(process: subprocess.Popen) -> tuple[int, dict]:
    output, _ = process.communicate(timeout=150)
    return process.returncode, json.loads(output) if output.startswith("{") else {}


def states(document: dict) -> dict[str, str]:
    return {one["name"]: one["state"] for one in document["findings"]}


def test_a_machine_that_is_fit_is_told_so(folder):
    code, said = finish(jepa("check", folder / "config.yaml"))
    assert code == ExitCode.DONE
    assert "Ready" in said
    assert not (folder / "runs").exists()


def test_ranks_of_this_machine_are_checked_with_what_lies_between_them(folder):
    code, document = ends(jepa("check", folder / "config.yaml", "--ranks", 2, "--json"))
    assert code == ExitCode.DONE
    found = {one["name"]: one for one in document["findings"]}
    assert {one["state"] for one in found.values()} <= {"ok", "skip", "warn"}
    measured = found["network"]["values"]
    rates = ("all_reduce_gb_per_second", "all_gather_gb_per_second", "pair_gb_per_second")
    assert all(measured[name] > 0 for name in rates)
    assert found["nodes"]["got"] == "2 came"
    assert document["bad_nodes"] == []


def test_a_node_that_is_unfit_is_named_for_the_scheduler_and_all_end_alike(folder):
    port = free_port()
    (folder / "bad").write_text("of an earlier start\n")
    ranks = [start(folder, RANK=rank, MASTER_PORT=port, limit_files=rank == 2) for rank in range(3)]
    told = [ends(rank) for rank in ranks]
    assert [code for code, _ in told] == [ExitCode.PEER_LOST] * 3
    document = told[0][1]
    assert {name for name, state in states(document).items() if state == "fail"} == {"open files"}
    assert document["bad_nodes"] == ["n2"]
    assert (folder / "bad").read_text() == "n2\n"


def test_nodes_that_never_come_or_hang_are_named_in_time(folder):
    port, begin = free_port(), time.monotonic()
    rank = start(folder, RANK=0, MASTER_PORT=port, seconds=12)
    idle = start(folder, "tests.workers.idle_check", RANK=1, MASTER_PORT=port)
    code, document = ends(rank)
    idle.kill()
    idle.communicate()
    assert code == ExitCode.PEER_LOST
    nodes = next(one for one in document["findings"] if one["name"] == "nodes")
    # Rank 1 came and then said nothing; rank 2 did not even come.
    assert "1 on n1, 2 on n2" in nodes["got"]
    assert document["bad_nodes"] == ["n1", "n2"]
    assert (folder / "bad").read_text() == "n1\nn2\n"
    assert time.monotonic() - begin < 100


def test_a_master_that_never_comes_is_named_and_nobody_is_excluded_for_it(folder):
    (folder / "bad").unlink(missing_ok=True)
    process = start(folder, RANK=1, MASTER_PORT=free_port(), seconds=6)
    _, said = process.communicate(timeout=150)
    assert process.returncode == ExitCode.PEER_LOST
    assert "where rank 0 on n0 should listen" in said
    # It may as well be this machine that is cut off: its word alone must not exclude another.
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere.yaml"], ExitCode.USAGE),
        (["CONFIG", "--seconds", "1"], ExitCode.USAGE),
        (["CONFIG", "--ranks", "0"], ExitCode.USAGE),
        (["CONFIG", "--cluster", "CONFIG"], ExitCode.CONFIG),
        (["CONFIG", "global_batch=7"], ExitCode.CONFIG),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(folder, words, expected, capsys):
    from pipeline.cli import main  # noqa: PLC0415

    paths = [str(folder / "config.yaml") if word == "CONFIG" else word for word in words]
    assert main(["check", *paths]) == expected
    assert "what to do" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_healthy_gpu_is_found_healthy(folder):
    config = tiny_config(runs_folder=str(folder))
    here = Situation(config=config, launch=read_launch({}), node="here", ranks_here=1)
    found = check_gpus(here)
    assert (found.state, len(found.values["visible"])) == ("ok", torch.cuda.device_count())
    assert all(rate > 1.0 for rate in check_matmul(here).values.values())
