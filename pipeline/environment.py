"""Who this process is: rank, device, process group, seeds; the only reader of the environment.

A rank learns its place from torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT) or, under srun, from Slurm's. Half of either set is an error, never a world of one:
ranks that each train alone would overwrite one another's checkpoints.
"""

import os
import random
import re
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.errors import PeerLostError, UsageError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Slurm hands out no port: one derived from the job id differs between jobs that share a node.
_FIRST_SLURM_PORT, _NUM_SLURM_PORTS = 20_000, 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """This process's place in the job and where the ranks meet."""

    rank: int
    local_rank: int
    world_size: int
    master_address: str
    master_port: int
    launcher: str
    """`torchrun`, `srun` or `alone`."""
    local_world_size: int = 1
    """Ranks on this machine."""
    agent_store: bool = False
    """True if torchrun's agent already serves the store at the master's address."""


def read_launch(env: dict[str, str] | None = None) -> Launch:
    """Finds this process's place in the job.

    Args:
        env: The variables to read; the process's own by default.

    Returns:
        The place; `launcher` is `alone` with a world of one if nothing launched us.

    Raises:
        UsageError: If the variables are incomplete or contradict each other.
    """
    env = dict(os.environ) if env is None else env
    if any(name in env for name in ("RANK", "WORLD_SIZE")):
        return _from_torchrun(env)
    if "SLURM_NTASKS" in env and int(env["SLURM_NTASKS"]) > 1:
        return _from_slurm(env)
    return Launch(
        rank=0,
        local_rank=0,
        world_size=1,
        master_address="127.0.0.1",
        master_port=0,
        launcher="alone",
    )


def choose_device(launch: Launch) -> torch.device:
    """This rank's accelerator, or the CPU where the machine has none.

    Raises:
        UsageError: If the node has GPUs but fewer than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_visible = torch.cuda.device_count()
    if launch.launcher == "srun" and num_visible == 1:
        # srun can show every task its own GPU only, which is then number 0 to each of them.
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    if launch.local_rank >= num_visible:
        raise UsageError(
            f"Local rank {launch.local_rank} has no GPU: this node shows {num_visible} of them.",
            remedy="Start one rank per visible GPU.",
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def join_process_group(launch: Launch, device: torch.device, *, timeout_seconds: float) -> None:
    """Meets the other ranks; the group is NCCL on GPUs and gloo on CPUs.

    Args:
        launch: This process's place.
        device: Decides the backend.
        timeout_seconds: How long to wait for the others, and for any later collective.

    Raises:
        PeerLostError: If some ranks do not come in time; their numbers are named.
    """
    timeout = timedelta(seconds=timeout_seconds)
    address, port = launch.master_address, launch.master_port
    if launch.launcher == "alone":
        # A world of one still needs a group, since ZeRO speaks through it; loopback only.
        port = free_port()
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address,
            port,
            launch.world_size,
            is_master=launch.rank == 0 and not launch.agent_store,
            timeout=timeout,
            wait_for_workers=False,
        )
        group_store = dist.PrefixStore(_attempt(), store)  # pyright: ignore[reportPrivateImportUsage]
        _wait_for_all(group_store, launch, timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise PeerLostError(
            f"Rank {launch.rank} of {launch.world_size} could not meet the others at "
            f"{address}:{port} within {timeout_seconds:.0f} s: {error}",
            remedy="Check that rank 0 runs, its address is reachable and the port is free.",
        ) from error
    # DeepSpeed reads these of torchrun's variables itself, whoever started us.
    os.environ.update(
        RANK=str(launch.rank),
        LOCAL_RANK=str(launch.local_rank if device.index is None else device.index),
        WORLD_SIZE=str(launch.world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=group_store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )


def leave_process_group() -> None:
    """Ends this rank's part in the process group, if it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Gives every rank the same start, so that all build the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below still draw from the global one
    torch.manual_seed(seed)


def set_cpu_threads(launch: Launch) -> None:
    """Shares the machine's cores among its ranks unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))


def prepare_libraries(extensions: Path) -> None:
    """Settings that DeepSpeed and MLflow read from the environment when they are imported."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WDS_SECURE", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def job_id() -> tuple[str, str]:
    """The scheduler's job and which of its starts this is; empty without a scheduler."""
    return os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")


def job_end() -> float | None:
    """When the scheduler ends this job, unix seconds; None if it does not say."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdigit() else None


def record_collectives(folder: Path) -> None:
    """Lets NCCL's flight recorder keep its last collectives and dump them when one times out."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl-rank-"))


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _from_torchrun(env: dict[str, str]) -> Launch:
    missing = [name for name in _TORCHRUN if name not in env]
    if missing:
        raise UsageError(
            f"The environment names a rank but not {', '.join(missing)}.",
            remedy="Start the ranks with torchrun, srun or `jepa train --ranks N`.",
        )
    return Launch(
        rank=int(env["RANK"]),
        local_rank=int(env["LOCAL_RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        master_address=env["MASTER_ADDR"],
        master_port=int(env["MASTER_PORT"]),
        launcher="torchrun",
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm(env: dict[str, str]) -> Launch:
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        raise UsageError(
            f"This Slurm job has {env['SLURM_NTASKS']} tasks but was started outside of srun, "
            "so it would train alone.",
            remedy="Put srun before the command.",
        )
    job_id = int(env.get("SLURM_JOB_ID", "0"))
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    port = _FIRST_SLURM_PORT + job_id % _NUM_SLURM_PORTS
    return Launch(
        rank=int(env["SLURM_PROCID"]),
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        world_size=int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"])),
        master_address=env.get("MASTER_ADDR", first_host(nodes)),
        master_port=int(env.get("MASTER_PORT", port)),
        launcher="srun",
        # Slurm writes "8" or, for uneven nodes, "8(x2),4": the first number serves.
        local_world_size=int(re.split(r"\D", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0]),
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as `gpu[003-017,020],login1`."""
    match = re.match(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UsageError(f"Cannot read the Slurm node list {nodes!r}.")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def _attempt() -> str:
    # torchrun's store outlives a restart of its ranks: keys of the last attempt must not count.
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(["jepa", *(os.environ.get(name, "") for name in names)])


def _wait_for_all(store: Any, launch: Launch, timeout: timedelta) -> None:
    keys = [f"here/{rank}" for rank in range(launch.world_size)]
    store.set(keys[launch.rank], "1")
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise PeerLostError(
            f"Rank {launch.rank} of {launch.world_size} waited {timeout.total_seconds():.0f} s; "
            f"these ranks never came: {', '.join(missing)}.",
            remedy="Look at the logs of those ranks' nodes, then start the job again.",
        ) from None
