"""Bandwidth between all machines: pair by pair, then in the collectives that ZeRO-3 lives on."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from launch.preflight.checks.pairs import rounds, spread_out
from launch.preflight.finding import Finding, Situation
from pipeline.errors import ExitCode
from pipeline.meeting import name_ranks

NAME = "network"
_PAIR_BYTES = {"cuda": 128 << 20, "cpu": 4 << 20}
# A collective of hundreds of ranks with a few megabytes for each tells latency, not bandwidth.
_LEAST_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
_BYTES_PER_RANK, _MOST_BYTES = 8 << 20, 1 << 30
_REPEATS = 3
_MOST_ROUNDS = 24


def measure_network(
    situation: Situation, nodes: Mapping[int, str], device: torch.device, progress: dict[str, Any]
) -> Finding:
    """Exchanges with every other machine, an all-reduce and an all-gather; every rank calls it.

    NCCL lets some ranks exchange alone only in a group whose ranks are all connected, as it is if
    it was made for a device.

    Args:
        situation: Of this rank.
        nodes: The machine of every rank.
        device: Decides between NCCL and gloo; the process group stands.
        progress: Is kept up to date with what this rank waits for, for whoever gives up on it:
            `self` and `partner` are names of an exchange, machines or, on one machine, ranks.
    """
    leaders = first_ranks(nodes)
    names = {
        rank: nodes[rank] if len(set(nodes.values())) > 1 else f"rank {rank}" for rank in nodes
    }
    progress["self"] = names[situation.launch.rank]
    pairs = _pairs(situation.launch.rank, leaders, names, device, progress)
    progress.update(partner="", round=-1)
    world = len(nodes)
    progress["at"] = "an all-reduce of all ranks"
    reduced = _all_reduce_rate(world, device)
    progress["at"] = "an all-gather of all ranks"
    gathered = _all_gather_rate(world, device)
    return Finding(
        name=NAME,
        state="ok",
        exit_code=ExitCode.PEER_LOST,
        values={"pairs": pairs, "all_reduce": reduced, "all_gather": gathered},
    )


def without_device(kinds: Mapping[int, str], nodes: Mapping[int, str]) -> Finding:
    """Some ranks have a GPU and some have none: they cannot even connect."""
    lacking = [rank for rank, kind in kinds.items() if kind != "cuda"]
    blamed = tuple(dict.fromkeys(nodes[rank] for rank in lacking))
    return Finding(
        name=NAME,
        state="fail",
        expected="a GPU for every rank or for none",
        got=f"no GPU for {name_ranks(lacking, nodes)}",
        remedy="Start one rank per visible GPU; leave out a machine that shows fewer than others.",
        # With the same lack on every machine it is the number of ranks that is wrong.
        nodes=blamed if len(blamed) < len(set(nodes.values())) else (),
        exit_code=ExitCode.PEER_LOST,
    )


def first_ranks(nodes: Mapping[int, str]) -> list[int]:
    """One rank of each machine; all ranks if there is but one machine."""
    if len(set(nodes.values())) == 1:
        return sorted(nodes)
    firsts: dict[str, int] = {}
    for rank in sorted(nodes):
        firsts.setdefault(nodes[rank], rank)
    return sorted(firsts.values())


def _pairs(
    rank: int,
    leaders: list[int],
    names: Mapping[int, str],
    device: torch.device,
    progress: dict[str, Any],
) -> list[list[Any]]:
    """[machine, other machine, GB/s] of the exchanges that this rank is the first of."""
    found = []
    for number, pairs in enumerate(spread_out(rounds(len(leaders)), _MOST_ROUNDS)):
        for a, b in pairs:
            first, second = leaders[a], leaders[b]
            if rank not in (first, second):
                continue
            other = second if rank == first else first
            progress.update(
                at=f"an exchange with {names[other]}", partner=names[other], round=number
            )
            rate = _exchange_rate(other, device)
            if rank == first:
                found.append([names[first], names[second], rate])
    return found


def _exchange_rate(other: int, device: torch.device) -> float:
    """GB/s in either direction while both sides send and receive."""
    num_bytes = _PAIR_BYTES[device.type]
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def exchange(size: int) -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent[:size], other),
                dist.P2POp(dist.irecv, received[:size], other),
            ]
        )
        for work in works:
            work.wait()

    # The partner may still be busy with its former one: waiting for it is no bandwidth.
    exchange(8)
    return num_bytes / _best_seconds(lambda: exchange(num_bytes), device) / 1e9


def _all_reduce_rate(world: int, device: torch.device) -> float:
    """Bus bandwidth in GB/s: 2 (n − 1) / n of the bytes, as nccl-tests count it."""
    num_bytes = _collective_bytes(world, device)
    values = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    seconds = _best_seconds(lambda: dist.all_reduce(values), device)
    return 2 * (world - 1) / world * num_bytes / seconds / 1e9


def _all_gather_rate(world: int, device: torch.device) -> float:
    """Bus bandwidth in GB/s: (n − 1) / n of what every rank has at the end."""
    part = _collective_bytes(world, device) // world // 4
    own = torch.zeros(part, dtype=torch.float32, device=device)
    whole = torch.empty(part * world, dtype=torch.float32, device=device)
    parts = list(whole.chunk(world))

    def gather() -> None:
        if device.type == "cuda":
            dist.all_gather_into_tensor(whole, own)
        else:
            dist.all_gather(parts, own)

    return (world - 1) * part * 4 / _best_seconds(gather, device) / 1e9


def _collective_bytes(world: int, device: torch.device) -> int:
    least = _LEAST_BYTES[device.type]
    on_gpu = device.type == "cuda"
    return max(least, min(_MOST_BYTES, world * _BYTES_PER_RANK)) if on_gpu else least


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The quickest of a few, after one that connects."""
    taken = []
    for _ in range(_REPEATS + 1):
        _finish(device)
        begin = time.perf_counter()
        work()
        _finish(device)
        taken.append(time.perf_counter() - begin)
    return max(1e-9, min(taken[1:]))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
