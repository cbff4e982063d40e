"""A rank finds its place, or says plainly why it cannot; ranks meet, or say who is missing."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.environment import first_host, free_port, node_name, read_launch
from pipeline.errors import ExitCode, UsageError
from pipeline.meeting import name_ranks
from pipeline.place import hosts_in

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
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[017-018]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
# Ranks must not inherit a place from whatever runs these tests.
CLEAN = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "4"}, "rank 4 does not exist among 4"),
        ({"RANK": "-1"}, "rank -1 does not exist"),
        ({"RANK": "three"}, "whole number in RANK, got 'three'"),
        ({"MASTER_PORT": ""}, "whole number in MASTER_PORT"),
    ],
)
def test_a_place_that_cannot_be_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        read_launch({**TORCHRUN, **changes})


def test_sruns_variables_give_the_place_and_a_port_of_the_job():
    launch = read_launch(SLURM)
    assert (launch.rank, launch.local_rank, launch.world_size) == (9, 1, 16)
    assert (launch.master_address, launch.master_port) == ("gpu017", 24242)
    assert (launch.launcher, launch.local_world_size) == ("srun", 8)
    assert launch.hosts == ("gpu017",) * 8 + ("gpu018",) * 8


def test_uneven_nodes_know_how_many_tasks_each_has():
    uneven = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "12,4"}
    assert read_launch(uneven).local_world_size == 4
    assert read_launch(uneven).hosts == ("gpu017",) * 12 + ("gpu018",) * 4


def test_one_torchrun_a_node_has_its_ranks_on_the_nodes_of_the_step():
    env = {**SLURM, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert read_launch(env).hosts == ("gpu017", "gpu017", "gpu018", "gpu018")


def test_tasks_dealt_out_in_turn_are_not_named_by_a_wrong_host():
    assert read_launch({**SLURM, "SLURM_DISTRIBUTION": "cyclic"}).hosts == ()


def test_a_batch_script_that_forgot_srun_does_not_train_alone():
    env = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    with pytest.raises(UsageError, match="16 tasks"):
        read_launch(env)


def test_a_world_of_one_left_over_from_another_shell_does_not_make_srun_tasks_train_alone():
    env = {**SLURM, **TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(UsageError, match=r"16 tasks on 2 nodes.*1 ranks in all"):
        read_launch(env)


def test_a_torchrun_that_knows_only_its_own_node_does_not_train_alone():
    env = {**SLURM, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "1"}
    with pytest.raises(UsageError, match="2 tasks on 2 nodes"):
        read_launch(env)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_ranks_of_a_launcher_that_we_do_not_know_do_not_train_alone(name):
    with pytest.raises(UsageError, match=f"{name} says that there are 4 processes"):
        read_launch({name: "4"})


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


def test_all_hosts_of_a_node_list():
    expected = ["gpu003", "gpu004", "gpu020", "login1", "a9-ib", "a10-ib"]
    assert hosts_in("gpu[003-004,020],login1,a[9-10]-ib") == expected


@pytest.mark.parametrize("nodes", ["", "gpu[", "gpu[1-", ",,"])
def test_what_is_no_node_list_is_refused(nodes):
    with pytest.raises(UsageError, match="Cannot read the Slurm node list"):
        first_host(nodes)


@pytest.mark.slurm
@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs Slurm's scontrol")
def test_node_lists_mean_what_slurm_says_that_they_mean(tmp_path):
    (tmp_path / "slurm.conf").write_text("ClusterName=c\nSlurmctldHost=localhost\n")
    nodes = "gpu[003-005,020,098-101],login1,a[1-2],rack2-n[07-11]"
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes],
        env={**CLEAN, "SLURM_CONF": str(tmp_path / "slurm.conf")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert hosts_in(nodes) == done.stdout.split()


def test_ranks_are_named_by_their_host():
    hosts = dict.fromkeys(range(8), "gpu017") | dict.fromkeys(range(8, 16), "gpu018")
    assert name_ranks([8, 9, 10, 11, 3, 5, 16], hosts) == "3, 5 on gpu017, 8 to 11 on gpu018, 16"


@given(st.sets(st.integers(0, 200), min_size=1))
def test_no_missing_rank_is_left_out(ranks):
    told = set()
    for word in name_ranks(ranks, {}).split(", "):
        first, _, last = word.partition(" to ")
        told |= set(range(int(first), int(last or first) + 1))
    assert told == ranks


def test_a_node_is_called_as_the_scheduler_calls_it(monkeypatch):
    for name in ("JEPA_NODE_NAME", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    assert node_name() == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert node_name() == "node7"


JOIN = """
import sys
from pipeline.environment import *
from pipeline.errors import JepaError
import torch
try:
    join_process_group(read_launch(), torch.device('cpu'), timeout_seconds=float(sys.argv[1]))
except JepaError as error:
    print(error, error.remedy)
    sys.exit(error.exit_code)
print('met')
"""


def join(rank: int, port: int, *, seconds: float = 3, **changes: str) -> subprocess.Popen:
    env = {**CLEAN, **TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, str(seconds)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def ends(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_a_rank_that_never_comes_is_named_with_its_host():
    code, said = ends(join(0, free_port()))
    # Rank 1 belongs to this machine, since rank 0 does; of the others nothing is known.
    assert code == ExitCode.PEER_LOST
    assert f"these ranks never came: 1 on {socket.gethostname()}, 2, 3" in said


def test_a_missing_rank_of_a_slurm_step_is_named_with_its_node():
    slurm = {**SLURM, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    code, said = ends(join(0, free_port(), **slurm))
    assert code == ExitCode.PEER_LOST
    assert "2, 3 on gpu018" in said


def test_an_unreachable_master_ends_in_time_and_is_named():
    ranks = [join(1, free_port()), join(2, 9, MASTER_ADDR="no-such-host.invalid")]
    told = [ends(rank) for rank in ranks]
    assert [code for code, _ in told] == [ExitCode.PEER_LOST] * 2
    assert "Connection refused" in told[0][1]
    assert "no-such-host.invalid:9" in told[1][1]


def test_a_taken_port_is_told_by_rank_0():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        code, said = ends(join(0, other.getsockname()[1]))
    assert code == ExitCode.PEER_LOST
    assert "the port is taken" in said


def test_a_rank_that_is_started_twice_does_not_join_twice():
    port = free_port()
    ranks = [
        join(rank, port, seconds=60, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2") for rank in (0, 1, 1)
    ]
    told = [ends(rank) for rank in ranks]
    assert sorted(code for code, _ in told) == [0, 0, ExitCode.USAGE]
    assert "rank 1 was started twice" in "".join(said for _, said in told)


def test_ranks_that_count_differently_do_not_meet():
    port = free_port()
    ranks = [join(rank, port, seconds=60, WORLD_SIZE=str(3 - rank)) for rank in (0, 1)]
    # The one that signs later is refused; the other would go on waiting for a third.
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    refused = next(rank for rank in ranks if rank.poll() is not None)
    for rank in ranks:
        rank.kill()
    told = ends(refused)
    [ends(rank) for rank in ranks if rank is not refused]
    assert told[0] == ExitCode.USAGE
    assert "another one that there are" in told[1]
