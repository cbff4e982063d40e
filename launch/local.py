"""Starts the ranks of a run on this machine, and ends with the exit code that says what happened.

torchrun's agent ends with 1 whatever its ranks ended with, and dies of SIGUSR1 before a rank hears
of it; a scheduler that requeues on 75 needs the ranks' own word. This is the small part of it that
one machine needs: environment, signals, exit codes. Of several pods each runs one of these; under
srun none is needed, as every rank is a task.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from pipeline.errors import ExitCode
from pipeline.place import Node
from pipeline.track.faults import RankFault, write_fault
from pipeline.track.folder import start_times
from pipeline.track.rewinds import pending, read_rewinds

# A rank that lost a peer notices within seconds; one that does not is stuck in a collective.
_GRACE_SECONDS = 20.0
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_POLL_SECONDS = 0.1
# Several machines start again after a rewind at another port, of so many in turn.
_NUM_PORTS = 8


def start_ranks(
    arguments: Sequence[str], *, num_ranks: int, port: int, run_dir: Path | None = None
) -> int:
    """Runs `python ARGUMENTS` once a rank, all of them on this machine, and waits for them.

    Args:
        arguments: What follows the interpreter on each rank's command line.
        num_ranks: Ranks to start, with one GPU each where there are any.
        port: Free TCP port on the loopback interface where the ranks meet.
        run_dir: Folder of the run, where it is written down which rank was killed by a signal.

    Returns:
        As `start_node`.
    """
    return start_node(arguments, node=_this_machine(num_ranks, port), run_dir=run_dir)


def start_node(arguments: Sequence[str], *, node: Node, run_dir: Path | None = None) -> int:
    """Runs `python ARGUMENTS` once for every rank of one machine and waits for them.

    Args:
        arguments: What follows the interpreter on each rank's command line.
        node: Which of the machines this is, and where all ranks meet.
        run_dir: Folder of the run, where it is written down which rank was killed by a signal.

    Returns:
        0 or 75 if no rank failed, else the code of a rank that did: of the cause of it, if the
        others only lost that rank. 128 + n if signal n ended all of them before they began.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    with _forwarding(ranks) as forwarded:
        # One by one into the list that signals are passed on to, so that none is left out.
        ranks.extend(_start(arguments, number, node) for number in range(node.num_ranks))
        for number in forwarded:  # came while they were being started
            _send(ranks, number)
        _wait(ranks, run_dir, first=node.rank * node.num_ranks)
    told = next((n for n in forwarded if all(p.returncode == -n for p in ranks)), None)
    if told is not None:
        # They had not begun to listen yet: nothing was saved and nothing is lost.
        return 128 + told
    failure = _failure(ranks)
    if failure is not None:
        rank, code = failure
        status = ranks[rank].returncode
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
        name = f"rank {node.rank * node.num_ranks + rank}"
        print(f"{name} {how}", file=sys.stderr)  # noqa: T201 - a launcher's word
        return code
    return max(_code(process) for process in ranks)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m launch.local RANKS PORT RUN ARGUMENTS…`: what `jepa train --ranks N` becomes."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    num_ranks, port, run_dir = int(words[0]), int(words[1]), Path(words[2])
    return run_node(words[3:], node=_this_machine(num_ranks, port), run_dir=run_dir)


def run_node(arguments: Sequence[str], *, node: Node, run_dir: Path) -> int:
    """Starts the ranks of one machine, and again as often as the run asks to go back.

    Returns:
        As `start_node`.
    """
    words, starts = list(arguments), 0
    while True:
        # Ranks of a machine that is quick to start again would meet the store of the last start.
        port = node.master_port + (starts % _NUM_PORTS if node.count > 1 else 0)
        code = start_node(words, node=replace(node, master_port=port), run_dir=run_dir)
        starts += 1
        if code != ExitCode.SAVED_RUN_AGAIN or pending(read_rewinds(run_dir)) is None:
            return code
        # The run itself asked to go back before a spike; how often it may is its own limit.
        words = ["-m", "pipeline.cli", "resume", str(run_dir)]


def _this_machine(num_ranks: int, port: int) -> Node:
    address = "127.0.0.1"
    return Node(rank=0, count=1, num_ranks=num_ranks, master_address=address, master_port=port)


def _write_down(run_dir: Path, rank: int, number: int) -> None:
    """A killed rank has no time for a last word of its own; rank 0 waits a moment for this one."""
    fault = RankFault(
        attempt=max(1, len(start_times(run_dir))),
        rank=rank,
        reason=f"rank {rank} was killed by signal {number} ({signal.Signals(number).name})",
        kind="Killed",
        exit_code=ExitCode.PEER_LOST,
        told_by="launcher",
    )
    write_fault(run_dir, fault)


def _start(arguments: Sequence[str], number: int, node: Node) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "RANK": str(node.rank * node.num_ranks + number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(node.count * node.num_ranks),
        "LOCAL_WORLD_SIZE": str(node.num_ranks),
        "MASTER_ADDR": node.master_address,
        "MASTER_PORT": str(node.master_port),
    }
    # A group of its own: Ctrl-C in a terminal reaches us alone, and every rank once through us.
    return subprocess.Popen([sys.executable, *arguments], env=env, process_group=0)


def _wait(ranks: list[subprocess.Popen[bytes]], run_dir: Path | None, *, first: int) -> None:
    """Waits for all; after a first failure the rest get some time, then are ended.

    `first` is the number in the run that the first of them has.
    """
    deadline: float | None = None
    while any(process.poll() is None for process in ranks):
        failure = _failure(ranks) if deadline is None else None
        if failure is not None:
            status = ranks[failure[0]].returncode
            if status < 0 and run_dir is not None and run_dir.is_dir():
                _write_down(run_dir, first + failure[0], -status)
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None:
            for process in ranks:
                if time.monotonic() > deadline or _is_stopped(process):
                    process.kill()
        time.sleep(_POLL_SECONDS)


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether it was stopped by a signal, so that it will never notice that the others are gone."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    return False


def _failure(ranks: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    fine = (ExitCode.DONE, ExitCode.SAVED_RUN_AGAIN)
    ended = [(n, _code(process)) for n, process in enumerate(ranks) if process.poll() is not None]
    failed = [(rank, code) for rank, code in ended if code not in fine]
    # A peer-lost code is an echo of another rank's failure: the cause goes first.
    failed.sort(key=lambda pair: ranks[pair[0]].returncode == ExitCode.PEER_LOST)
    return failed[0] if failed else None


def _code(process: subprocess.Popen[bytes]) -> int:
    code = process.returncode
    if code is None or code >= 0:
        return code if code is not None else 0
    # Killed by a signal: whoever sent it, for the run it means that a peer was lost.
    return ExitCode.PEER_LOST


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


@contextlib.contextmanager
def _forwarding(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    forwarded: list[int] = []

    def forward(number: int, _frame: object) -> None:
        # A closed terminal hangs up; for a run that is a request to save and stop.
        number = signal.SIGTERM if number == signal.SIGHUP else number
        forwarded.append(number)
        _send(ranks, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
