"""A rank finds its place, or says plainly why it cannot."""

import subprocess
import sys

import pytest

from pipeline.environment import first_host, free_port, read_launch
from pipeline.errors import UsageError

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[017-018]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def test_torchruns_variables_give_the_place():
    launch = read_launch(TORCHRUN)
    assert (launch.rank, launch.local_rank, launch.world_size) == (3, 1, 4)
    assert (launch.master_address, launch.master_port) == ("10.0.0.1", 29500)
    assert (launch.launcher, launch.local_world_size) == ("torchrun", 2)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"])
def test_half_of_torchruns_variables_are_an_error_not_a_world_of_one(missing):
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UsageError, match=missing):
        read_launch(env)


def test_sruns_variables_give_the_place_and_a_port_of_the_job():
    launch = read_launch(SLURM)
    assert (launch.rank, launch.local_rank, launch.world_size) == (9, 1, 16)
    assert (launch.master_address, launch.master_port) == ("gpu017", 24242)
    assert (launch.launcher, launch.local_world_size) == ("srun", 8)


def test_a_batch_script_that_forgot_srun_does_not_train_alone():
    env = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    with pytest.raises(UsageError, match="16 tasks"):
        read_launch(env)


def test_without_a_launcher_the_world_is_one():
    launch = read_launch({"HOME": "/home/someone"})
    assert (launch.rank, launch.world_size, launch.launcher) == (0, 1, "alone")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login1", "login1"),
        ("gpu[003-017,020],login1", "gpu003"),
        ("a7,b[1-2]", "a7"),
        ("rack[2]-node", "rack2-node"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_a_rank_that_never_comes_is_named():
    code = (
        "from pipeline.environment import *\n"
        "import torch\n"
        "join_process_group(read_launch(), torch.device('cpu'), timeout_seconds=2)\n"
    )
    env = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "these ranks never came: 1, 2, 3" in done.stderr
