"""Who this process is: rank, device, process group, seeds; the only reader of the environment.

A rank learns its place from torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT) or, under srun, from Slurm's; `pipeline.place` reads them.
"""

import os
import random
import socket
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from pipeline.errors import UsageError
from pipeline.meeting import meet
from pipeline.place import Launch, first_host, place_of

__all__ = [
    "Launch", "attempt", "choose_device", "end_rank", "extensions_dir", "first_host", "free_port",
    "job_end", "job_id", "join_process_group", "leave_process_group", "node_name",
    "prepare_libraries", "read_launch", "record_collectives", "seed_everything", "set_cpu_threads",
]  # fmt: skip

# What stood in the environment before a group was joined: left there, the next reader of this
# process would take it for a launcher's word.
_BEFORE: dict[str, str | None] = {}


def read_launch(env: dict[str, str] | None = None) -> Launch:
    """Finds this process's place in the job.

    Args:
        env: The variables to read; the process's own by default.

    Returns:
        The place; `launcher` is `alone` with a world of one if nothing launched us.

    Raises:
        UsageError: If the variables are incomplete or contradict each other.
    """
    return place_of(dict(os.environ) if env is None else env)


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
        PeerLostError: The master is not reached, or ranks do not come in time; they are named.
        UsageError: This rank was started twice.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if launch.launcher == "alone":
        # A world of one still needs a group, since ZeRO speaks through it; loopback only.
        launch = replace(launch, master_port=free_port())
    store = meet(launch, timeout_seconds=timeout_seconds, attempt=attempt())
    # DeepSpeed reads these of torchrun's variables itself, whoever started us.
    told = {
        "RANK": str(launch.rank),
        "LOCAL_RANK": str(launch.local_rank if device.index is None else device.index),
        "WORLD_SIZE": str(launch.world_size),
        "MASTER_ADDR": launch.master_address,
        "MASTER_PORT": str(launch.master_port),
    }
    _BEFORE.update({name: os.environ.get(name) for name in told})
    os.environ.update(told)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )


def leave_process_group() -> None:
    """Ends this rank's part in the process group, if it has one, and what DeepSpeed was told."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in _BEFORE.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _BEFORE.clear()


def end_rank(code: int) -> NoReturn:
    """Ends a rank whose work is done and closed, without the interpreter's own tear-down.

    There a thread of gloo or NCCL that still lets go of a tensor meets an interpreter that is no
    more and aborts the process, rarely, but among a thousand ranks often enough: a finished run
    would be told as killed by signal 6.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


def record_collectives(prefix: Path) -> None:
    """Lets torch's flight recorder keep the last collectives; NCCL dumps them at its time-out.

    Args:
        prefix: Of the file's path, which ends with the rank; its folder must be there by then.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(prefix))


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def attempt() -> str:
    """Tells this start's keys in the ranks' store from those of an earlier start.

    torchrun's store outlives a restart of its ranks.
    """
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(["jepa", *(os.environ.get(name, "") for name in names)])


def node_name() -> str:
    """What the scheduler calls this machine: JEPA_NODE_NAME, Slurm's name, or the host's own."""
    names = ("JEPA_NODE_NAME", "SLURMD_NODENAME")
    return next((os.environ[name] for name in names if os.environ.get(name)), socket.gethostname())


def extensions_dir() -> Path:
    """Where torch keeps the operators that it compiles when they are first used."""
    default = Path.home() / ".cache" / "jepa" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
