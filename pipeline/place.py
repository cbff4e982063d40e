"""A process's place among the ranks, as torchrun's or Slurm's variables tell it.

Half of either set, or sets that contradict each other, are an error and never a world of one:
ranks that each train alone would overwrite one another's checkpoints.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError, UsageError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Slurm hands out no port: one derived from the job id differs between jobs that share a node. From
# 32768 on the kernel hands out ports to anybody.
_FIRST_SLURM_PORT, _NUM_SLURM_PORTS = 20_000, 12_000
# What other launchers tell their processes; with those alone each would believe to be the only one.
_FOREIGN_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_HOST_WORD = re.compile(r"([^\[\],]*)(?:\[([0-9,\-]+)\]([^\[\],]*))?(?:,|$)")
_MANIFEST = "Render the job again with `jepa launch k8s --print`; its Job must be Indexed."
_SOMETHING = "Start the ranks with torchrun, srun or `jepa train --ranks N`."


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
    hosts: tuple[str, ...] = ()
    """The host of every rank, where the launcher tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine's place among those that each start their own ranks, as pods do."""

    rank: int
    count: int
    num_ranks: int
    """Ranks of every machine."""
    master_address: str
    master_port: int


def node_of(env: Mapping[str, str]) -> Node:
    """The place of a pod, as an Indexed Job, a JobSet or a TrainJob tells it.

    JEPA_NODES, JEPA_RANKS_PER_NODE, MASTER_ADDR and MASTER_PORT are our manifests' own words; the
    index is the Job controller's, and PET_… are Kubeflow's.

    Raises:
        ConfigError: Something is missing or impossible; no pod may believe to be the only one.
    """
    said = [word for word in (env.get("JOB_COMPLETION_INDEX"), env.get("PET_NODE_RANK")) if word]
    if len(set(said)) > 1:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX {said[0]} contradicts PET_NODE_RANK {said[1]}: this pod cannot "
            "tell which node it is",
            remedy=_MANIFEST,
        )
    node = Node(
        rank=_told(env, "JOB_COMPLETION_INDEX", "PET_NODE_RANK"),
        count=_told(env, "JEPA_NODES", "PET_NNODES"),
        num_ranks=_told(env, "JEPA_RANKS_PER_NODE", "PET_NPROC_PER_NODE"),
        master_address=env.get("MASTER_ADDR") or env.get("PET_MASTER_ADDR") or "",
        master_port=_told(env, "MASTER_PORT", "PET_MASTER_PORT"),
    )
    if not 0 <= node.rank < node.count or node.num_ranks < 1:
        raise ConfigError(
            f"node {node.rank} with {node.num_ranks} ranks does not exist among {node.count} nodes",
            remedy=_MANIFEST,
        )
    if not node.master_address:
        raise ConfigError(
            "expected the first pod's name in MASTER_ADDR, got none", remedy=_MANIFEST
        )
    return node


def place_of(env: Mapping[str, str]) -> Launch:
    """The place that a set of variables tells.

    Returns:
        The place; `launcher` is `alone` with a world of one if nothing launched us.

    Raises:
        UsageError: If the variables are incomplete or contradict each other.
    """
    if any(name in env for name in ("RANK", "WORLD_SIZE")):
        return _checked(_from_torchrun(env), env)
    if _number(env, "SLURM_NTASKS", 1) > 1:
        return _checked(_from_slurm(env), env)
    for name in _FOREIGN_SIZES:
        if _number(env, name, 1) > 1:
            raise UsageError(
                f"{name} says that there are {env[name]} processes, but nothing says which of "
                "them this is, so it would train alone.",
                remedy=_SOMETHING,
            )
    return Launch(
        rank=0,
        local_rank=0,
        world_size=1,
        master_address="127.0.0.1",
        master_port=0,
        launcher="alone",
    )


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    missing = [name for name in _TORCHRUN if name not in env]
    if missing:
        raise UsageError(
            f"The environment names a rank but not {', '.join(missing)}.", remedy=_SOMETHING
        )
    world_size = _number(env, "WORLD_SIZE")
    return Launch(
        rank=_number(env, "RANK"),
        local_rank=_number(env, "LOCAL_RANK"),
        world_size=world_size,
        master_address=env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT"),
        launcher="torchrun",
        local_world_size=_number(env, "LOCAL_WORLD_SIZE", 1),
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        hosts=_hosts_of_ranks(env, world_size),
    )


def _from_slurm(env: Mapping[str, str]) -> Launch:
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        raise UsageError(
            f"This Slurm job has {env['SLURM_NTASKS']} tasks but was started outside of srun, "
            "so it would train alone.",
            remedy="Put srun before the command.",
        )
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    port = _FIRST_SLURM_PORT + _number(env, "SLURM_JOB_ID", 0) % _NUM_SLURM_PORTS
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS"))
    counts = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = _number(env, "SLURM_NODEID", 0)
    return Launch(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID", 0),
        world_size=world_size,
        master_address=env.get("MASTER_ADDR", first_host(nodes)),
        master_port=_number(env, "MASTER_PORT", port),
        launcher="srun",
        local_world_size=counts[node] if node < len(counts) else counts[0],
        hosts=_hosts_of_ranks(env, world_size),
    )


def _checked(launch: Launch, env: Mapping[str, str]) -> Launch:
    """Refuses a place that cannot be, and a group that is smaller than what was started."""
    if not 0 <= launch.rank < launch.world_size:
        raise UsageError(
            f"rank {launch.rank} does not exist among {launch.world_size}", remedy=_SOMETHING
        )
    step_tasks, step_nodes = (
        _number(env, name, 1) if "SLURM_PROCID" in env else 1
        for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")
    )
    groups = _number(env, "GROUP_WORLD_SIZE", 0)
    stands_alone = groups == 1 and step_nodes > 1
    if launch.world_size < step_tasks or stands_alone:
        raise UsageError(
            f"srun started {step_tasks} tasks on {step_nodes} nodes, but the environment tells "
            f"this one that there are {launch.world_size} ranks in all: every task would train "
            "alone and all would write to the same run.",
            remedy="Unset RANK and WORLD_SIZE before srun, or give torchrun --nnodes and a "
            "rendezvous address.",
        )
    return launch


def hosts_in(nodes: str) -> list[str]:
    """All hosts of a Slurm node list such as `gpu[003-017,020],login1`, in order.

    Raises:
        UsageError: It is no node list.
    """
    found, at = list[str](), 0
    while at < len(nodes):
        match = _HOST_WORD.match(nodes, at)
        if match is None or not match.group(0).strip(","):
            raise UsageError(f"Cannot read the Slurm node list {nodes!r}.")
        prefix, numbers, suffix = match.groups()
        if numbers is None:
            found.append(prefix)
        else:
            found += [f"{prefix}{number}{suffix}" for number in _numbers(numbers)]
        at = match.end()
    return found


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list."""
    hosts = hosts_in(nodes)
    if not hosts:
        raise UsageError(f"Cannot read the Slurm node list {nodes!r}.")
    return hosts[0]


def _numbers(ranges: str) -> list[str]:
    """`003-005,020` as the numbers that it means, with their leading zeros."""
    found = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        stop = int(last) if dash else int(first)
        found += [str(number).zfill(len(first)) for number in range(int(first), stop + 1)]
    return found


def _hosts_of_ranks(env: Mapping[str, str], world_size: int) -> tuple[str, ...]:
    """The host of every rank of a Slurm step that deals its tasks out node by node."""
    nodes, tasks = env.get("SLURM_STEP_NODELIST"), env.get("SLURM_STEP_TASKS_PER_NODE")
    dealt = env.get("SLURM_DISTRIBUTION", "block").split(",")[0]
    if nodes is None or tasks is None or not dealt.startswith("block"):
        return ()
    hosts, counts = hosts_in(nodes), _tasks_per_node(tasks)
    if len(hosts) != len(counts):
        return ()
    if sum(counts) != world_size:
        # One torchrun a node: its ranks are spread evenly.
        if any(count != 1 for count in counts) or world_size % len(hosts):
            return ()
        counts = [world_size // len(hosts)] * len(hosts)
    return tuple(host for host, count in zip(hosts, counts, strict=True) for _ in range(count))


def _tasks_per_node(words: str) -> list[int]:
    """`8(x2),4` is 8, 8 and 4 tasks."""
    counts = []
    for word in words.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if match is None:
            raise UsageError(f"Cannot read SLURM_STEP_TASKS_PER_NODE {words!r}.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _told(env: Mapping[str, str], ours: str, theirs: str) -> int:
    word = env.get(ours) or env.get(theirs) or ""
    if not word.isascii() or not word.isdigit():
        raise ConfigError(
            f"expected a whole number in {ours} (or {theirs}), got {word!r}", remedy=_MANIFEST
        )
    return int(word)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    word = env.get(name)
    if word is None and default is not None:
        return default
    try:
        return int(word or "")
    except ValueError:
        raise UsageError(f"expected a whole number in {name}, got {word!r}") from None
