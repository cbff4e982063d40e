"""Where the ranks of a job meet, and who is missing if they do not.

Rank 0 serves a small key-value store at the master's address. Every rank signs its number there
with its host, so that whoever waits can say which ranks never came and where they should have come
from, and so that no number is taken twice.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.errors import PeerLostError, UsageError
from pipeline.place import Launch

_RETRY_SECONDS = 0.2
_MOST_GROUPS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What a rank signs with."""

    host: str
    pid: int
    world_size: int

    @property
    def words(self) -> str:
        """How messages name it."""
        return f"process {self.pid} on {self.host}"


def meet(launch: Launch, *, timeout_seconds: float, attempt: str) -> Any:
    """Waits until all ranks have signed in the store.

    Args:
        launch: This process's place.
        timeout_seconds: How long to wait for the others, all in all.
        attempt: Tells the keys of this start from those of an earlier one in the same store.

    Returns:
        The store, for a process group to be made with.

    Raises:
        PeerLostError: The master cannot be reached, its port is taken, or ranks do not come in
            time; they are named with their hosts.
        UsageError: This rank was started twice, or the ranks disagree about their number.
    """
    deadline = time.monotonic() + timeout_seconds
    store = open_store(launch, deadline, attempt)
    sign(store, launch)
    missing = wait_for(store, range(launch.world_size), deadline)
    if missing:
        raise PeerLostError(
            f"Rank {launch.rank} of {launch.world_size} waited {timeout_seconds:.0f} s; "
            f"these ranks never came: {name_ranks(missing, hosts_of(store, launch))}.",
            remedy="Look at the logs of those ranks' nodes, then start the job again.",
        )
    return store


def open_store(launch: Launch, deadline: float, attempt: str) -> Any:
    """The store of the job: rank 0 serves it, unless torchrun's agent does.

    Raises:
        PeerLostError: The port is taken, or the master does not answer by the deadline.
    """
    where = f"{launch.master_address}:{launch.master_port}"
    is_server = launch.rank == 0 and not launch.agent_store
    try:
        if not is_server:
            _reach(launch, deadline)
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            launch.master_address,
            launch.master_port,
            launch.world_size,
            is_master=is_server,
            timeout=left,
            wait_for_workers=False,
        )
    except (OSError, dist.DistNetworkError, dist.DistStoreError) as error:
        first_line = str(error).strip().splitlines()[0]
        if is_server and "EADDRINUSE" in first_line:
            raise PeerLostError(
                f"Rank 0 cannot wait for the others at {where}: the port is taken on "
                f"{socket.gethostname()}, by another job or by a second rank 0.",
                remedy="End that process (`ss -ltnp` names it) or set another MASTER_PORT.",
            ) from error
        raise PeerLostError(
            f"Rank {launch.rank} of {launch.world_size} could not meet the others at {where}, "
            f"where rank 0{_on(launch, 0)} should listen: {first_line}",
            remedy="Check that rank 0 runs, its address is reachable and the port is free.",
        ) from error
    return dist.PrefixStore(attempt, store)  # pyright: ignore[reportPrivateImportUsage]


def sign(store: Any, launch: Launch) -> None:
    """Takes this rank's number.

    Raises:
        UsageError: Another process has it, or counts other numbers of ranks.
    """
    me = Signature(host=socket.gethostname(), pid=os.getpid(), world_size=launch.world_size)
    said = json.dumps({"host": me.host, "pid": me.pid, "world_size": me.world_size})
    found = store.compare_set(_key(launch.rank), "", said).decode()
    if found != said:
        raise UsageError(
            f"rank {launch.rank} was started twice: as {Signature(**json.loads(found)).words} and "
            f"as {me.words}",
            remedy="Start every rank once: two launchers share this master address and port.",
        )
    agreed = int(store.compare_set("world_size", "", str(launch.world_size)))
    if agreed != launch.world_size:
        raise UsageError(
            f"rank {launch.rank} on {me.host} was told that there are {launch.world_size} ranks, "
            f"another one that there are {agreed}",
            remedy="Give every node the same number of nodes and ranks.",
        )


def wait_for(store: Any, ranks: Iterable[int], deadline: float) -> list[int]:
    """Waits for signatures; returns the ranks that did not come by the deadline."""
    wanted = list(ranks)
    left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
    try:
        store.wait([_key(rank) for rank in wanted], left)
    except (dist.DistStoreError, dist.DistNetworkError):
        return [rank for rank in wanted if not _has_come(store, rank)]
    return []


def hosts_of(store: Any, launch: Launch) -> dict[int, str]:
    """The host of every rank, as far as it is known: signed, told by Slurm, or its neighbours'."""
    known = dict(enumerate(launch.hosts))
    for rank in range(launch.world_size):
        if _has_come(store, rank):
            known[rank] = json.loads(store.get(_key(rank)))["host"]
    size = max(1, launch.local_world_size)
    neighbours = {rank // size: host for rank, host in known.items()}
    for rank in range(launch.world_size):
        if rank not in known and rank // size in neighbours:
            known[rank] = neighbours[rank // size]
    return known


def name_ranks(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Ranks in words, by their host: `8 to 15 on gpu018, 17`."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        groups.setdefault(hosts.get(rank, ""), []).append(rank)
    words = [f"{_spans(group)}{f' on {host}' if host else ''}" for host, group in groups.items()]
    more = len(words) - _MOST_GROUPS
    return ", ".join(words[:_MOST_GROUPS]) + (
        f" and those of {more} more hosts" if more > 0 else ""
    )


def _reach(launch: Launch, deadline: float) -> None:
    """Returns when something listens at the master's address.

    The store's own client waits up to three times as long as it was told.
    """
    while True:
        left = max(_RETRY_SECONDS, deadline - time.monotonic())
        try:
            socket.create_connection((launch.master_address, launch.master_port), left).close()
        except OSError:
            # Not there yet, or a name that the cluster does not know yet.
            if time.monotonic() + _RETRY_SECONDS >= deadline:
                raise
            time.sleep(_RETRY_SECONDS)
        else:
            return


def _has_come(store: Any, rank: int) -> bool:
    try:
        return store.check([_key(rank)])
    except (dist.DistStoreError, dist.DistNetworkError):
        return False  # rank 0 has given up meanwhile, and its store with it


def _key(rank: int) -> str:
    return f"here/{rank}"


def _on(launch: Launch, rank: int) -> str:
    return f" on {launch.hosts[rank]}" if rank < len(launch.hosts) else ""


def _spans(ranks: list[int]) -> str:
    """Three or more in a row as `8 to 15`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    words = [
        f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans
    ]
    return ", ".join(words)
