"""All checks in order: those of a machine, those that all do at a time, those that compare."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launch.preflight.checks.batch import compare_batch, ranks_finding
from launch.preflight.checks.clocks import clock_finding, compare_clocks
from launch.preflight.checks.extensions import check_extensions, compare_extensions
from launch.preflight.checks.gpus import check_gpus, compare_gpus
from launch.preflight.checks.lease import check_lease
from launch.preflight.checks.links import compare_network
from launch.preflight.checks.matmul import check_matmul, compare_matmul
from launch.preflight.checks.memory import check_shared_memory
from launch.preflight.checks.mlflow import check_mlflow
from launch.preflight.checks.network import measure_network, without_device
from launch.preflight.checks.nodes import nodes_finding
from launch.preflight.checks.openfiles import check_open_files
from launch.preflight.checks.ports import check_ports
from launch.preflight.checks.shards import check_shards
from launch.preflight.checks.space import check_space
from launch.preflight.checks.speed import check_speed, compare_speed
from launch.preflight.checks.versions import check_versions, compare_versions
from launch.preflight.checks.writable import check_writable
from launch.preflight.finding import (
    Answer,
    Check,
    Comparison,
    Finding,
    Situation,
    exit_code,
)
from launch.preflight.gathering import Gathering
from launch.preflight.merging import merged
from launch.preflight.runner import Runner
from pipeline.environment import choose_device
from pipeline.errors import ExitCode, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Local:
    """A check of one machine."""

    name: str
    check: Check
    limit_seconds: float
    once: bool = False
    """By rank 0 alone."""
    each: bool = False
    """By every process, not once a machine."""
    together: bool = False
    """When all have come, since machines that share something measure it at a time."""
    exit_code: ExitCode = ExitCode.STORAGE
    compare: Comparison | None = None


_CHECKS = (
    _Local(name="run folder", check=check_writable, limit_seconds=10),
    _Local(name="space", check=check_space, limit_seconds=10),
    _Local(
        name="write speed", check=check_speed, limit_seconds=20, together=True,
        compare=compare_speed,
    ),
    _Local(name="shards", check=check_shards, limit_seconds=20),
    _Local(name="owner", check=check_lease, limit_seconds=15, once=True),
    _Local(name="versions", check=check_versions, limit_seconds=10, compare=compare_versions),
    _Local(name="gpus", check=check_gpus, limit_seconds=20, each=True,
           exit_code=ExitCode.PEER_LOST),
    _Local(
        name="matrix products", check=check_matmul, limit_seconds=30, each=True, together=True,
        exit_code=ExitCode.PEER_LOST, compare=compare_matmul,
    ),
    _Local(name="shared memory", check=check_shared_memory, limit_seconds=5),
    _Local(name="open files", check=check_open_files, limit_seconds=5),
    _Local(
        name="compiled ops", check=check_extensions, limit_seconds=10, compare=compare_extensions
    ),
    _Local(name="ports", check=check_ports, limit_seconds=5, once=True),
    _Local(name="mlflow", check=check_mlflow, limit_seconds=10, once=True),
)  # fmt: skip
# Shares of the whole time by which the processes have come, and the network has answered.
_MEET, _NETWORK = 0.45, 0.85
_COMPARISONS: tuple[Comparison, ...] = (compare_gpus, compare_batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a check of all machines came to; findings are rank 0's."""

    findings: tuple[Finding, ...]
    code: int
    must_leave: bool
    """The process must be ended the hard way: a check hangs in a thread, or a process group's
    threads are alive, whose end would wait for the others."""


def run_preflight(situation: Situation, *, seconds: float, say: Callable[[str], None]) -> Outcome:
    """Runs all checks; every process of the job calls it.

    Args:
        situation: What they may know.
        seconds: When all must be over, counted from now.
        say: Is told what is being done.

    Raises:
        PeerLostError: Rank 0 cannot be reached, or says nothing.
    """
    begin = time.monotonic()
    runner = Runner(begin + seconds, situation.node)
    situation = replace(situation, note=lambda words: setattr(runner, "at", words))
    launch = situation.launch
    if launch.launcher == "alone":
        say("checking this machine")
        found = [
            *_local(situation, runner, together=False),
            *_local(situation, runner, together=True),
        ]
        return _outcome(situation, [_answer(situation, found)], (), runner)
    say("waiting for the others")
    gathering = Gathering(launch, situation.node, begin + _MEET * seconds)
    found = _local(situation, runner, together=False)
    missing = gathering.missing(begin + _MEET * seconds)
    say("measuring")
    found += _local(situation, runner, together=True)
    found.append(clock_finding(gathering.clock_offset()))
    if not missing and launch.world_size > 1:
        say("measuring the network")
        left = begin + _NETWORK * seconds - time.monotonic()
        found.append(_network(situation, gathering, runner, left))
    gathering.tell(_answer(situation, found))
    return _together(situation, gathering, missing, runner, begin + seconds)


def _together(
    situation: Situation,
    gathering: Gathering,
    missing: list[int],
    runner: Runner,
    deadline: float,
) -> Outcome:
    """Rank 0 compares what all found; the others hear what it came to."""
    if situation.launch.rank != 0:
        code = gathering.verdict(None, deadline + 10.0)
        return Outcome(findings=(), code=code, must_leave=True)
    present = [rank for rank in range(situation.launch.world_size) if rank not in missing]
    answers = gathering.answers(present, deadline - 1.0)
    silent = [rank for rank in range(situation.launch.world_size) if rank not in answers]
    who = nodes_finding(situation.launch.world_size, sorted({*missing, *silent}), gathering.hosts())
    outcome = _outcome(situation, list(answers.values()), (who,), runner)
    gathering.verdict(outcome.code, deadline, others=len(answers) - 1)
    return outcome


def _local(situation: Situation, runner: Runner, *, together: bool) -> list[Finding]:
    """The checks of this process, of one kind."""
    launch = situation.launch
    found = []
    for one in _CHECKS:
        is_mine = launch.rank == 0 if one.once else one.each or launch.local_rank == 0
        if not is_mine or one.together is not together:
            continue
        found.append(
            runner.run(
                one.name,
                lambda one=one: one.check(situation),
                limit_seconds=one.limit_seconds,
                exit_code=one.exit_code,
            )
        )
    if not together and launch.local_rank == 0:
        found.append(ranks_finding(situation))
    return found


def _network(
    situation: Situation, gathering: Gathering, runner: Runner, limit_seconds: float
) -> Finding:
    progress: dict[str, Any] = {"at": "the connection of all ranks"}
    deadline = time.monotonic() + limit_seconds

    def measure() -> Finding:
        device = _device(situation)
        launch = situation.launch
        kinds = gathering.devices(device.type, deadline)
        if len(set(kinds.values())) > 1:
            return without_device(kinds, gathering.nodes())
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("network", gathering.store.clone()),  # pyright: ignore[reportPrivateImportUsage]
            rank=launch.rank,
            world_size=launch.world_size,
            # Ours ends first: NCCL's own watchdog would end the whole process without a word.
            timeout=timedelta(seconds=limit_seconds + 60.0),
            # Connects all at once. In the first exchange it would be that pair which hangs where
            # any rank cannot be reached.
            device_id=device if on_gpu else None,
        )
        return measure_network(situation, gathering.nodes(), device, progress)

    return runner.run("network", measure, limit_seconds=limit_seconds, progress=progress)


def _device(situation: Situation) -> torch.device:
    try:
        return choose_device(situation.launch)
    except UsageError:
        return torch.device("cpu")  # the missing GPU is told by another check


def _answer(situation: Situation, found: Sequence[Finding]) -> Answer:
    launch = situation.launch
    return Answer(rank=launch.rank, node=situation.node, findings=tuple(found))


def _outcome(
    situation: Situation, answers: Sequence[Answer], first: tuple[Finding, ...], runner: Runner
) -> Outcome:
    found = list(first)
    for one in _CHECKS:
        of_all = merged(one.name, answers)
        if of_all is not None and one.compare is not None and of_all.state != "fail":
            compared = one.compare(situation, answers)
            of_all = replace(compared, seconds=of_all.seconds)
        if of_all is not None:
            found.append(of_all)
    found += [compare(situation, answers) for compare in _COMPARISONS]
    if situation.launch.launcher != "alone":
        found += [compare_clocks(situation, answers), compare_network(situation, answers)]
    must_leave = runner.is_stuck or situation.launch.launcher != "alone"
    return Outcome(findings=tuple(found), code=int(exit_code(found)), must_leave=must_leave)


def leave(outcome: Outcome) -> None:
    """Ends the process at once where its threads would not let it end."""
    if outcome.must_leave:
        os._exit(outcome.code)
