"""torchrun's agent in a process of ours, so that the ranks' own exit code comes out of it.

As a command torchrun ends with 1 whatever its ranks ended with, so a scheduler cannot tell saved
(75) from wrong (78); it dies of SIGUSR1 and SIGUSR2, which schedulers warn with; and 30 s after
SIGTERM it kills ranks that are still saving. Here signals go on to the ranks and to nobody else:
the agent learns of them when the ranks have ended.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from pipeline.environment import free_port, read_launch
from pipeline.errors import ExitCode

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m launch.torchrun RANKS GRACE_SECONDS ARGUMENTS…`, one process a node.

    Under srun the node's place, the address and the port are those of the job.

    Returns:
        The exit code of `run_agent`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    place = read_launch()
    is_alone = place.launcher == "alone"
    return run_agent(
        words[2:],
        num_ranks=int(words[0]),
        grace_seconds=int(words[1]),
        node=(place.rank, place.world_size),
        meeting=("127.0.0.1", free_port())
        if is_alone
        else (place.master_address, place.master_port),
    )


def run_agent(
    arguments: Sequence[str],
    *,
    num_ranks: int,
    grace_seconds: int,
    node: tuple[int, int],
    meeting: tuple[str, int],
) -> int:
    """Runs the ranks of one node under torchrun's agent.

    Args:
        arguments: What follows the interpreter on each rank's command line, as `-m MODULE …`.
        num_ranks: Ranks of this node.
        grace_seconds: How long ranks may go on after another one of this node has ended.
        node: This node's number and how many there are: a static rendezvous needs no host name
            to be recognised.
        meeting: Address and port of the first node.

    Returns:
        0 if all ranks are done; 75 if all that ended were saved; else the code of a rank that
        failed, of the cause of it where others only lost it.
    """
    options = [
        f"--nnodes={node[1]}",
        f"--node-rank={node[0]}",
        f"--nproc-per-node={num_ranks}",
        f"--master-addr={meeting[0]}",
        f"--master-port={meeting[1]}",
        "--max-restarts=0",
        f"--shutdown-timeout={grace_seconds}",
        # Only its own handler for a lost terminal: all others would end the agent, and with it
        # the only one who knows how the ranks ended.
        "--signals-to-handle=SIGHUP",
    ]
    module = ["--module"] if arguments[:1] == ["-m"] else []
    arguments = arguments[1:] if module else arguments
    with _forwarding():
        try:
            run(parse_args([*options, *module, *arguments]))
        except ChildFailedError as error:
            return exit_code(list(error.failures.values()))
    return ExitCode.DONE


def exit_code(failures: Sequence[ProcessFailure]) -> int:
    """One code for all ranks of a node that did not end with 0."""
    ordered = sorted(failures, key=lambda failure: failure.timestamp)
    codes = [f.exitcode if f.exitcode > 0 else int(ExitCode.PEER_LOST) for f in ordered]
    failed = [code for code in codes if code != ExitCode.SAVED_RUN_AGAIN]
    causes = [code for code in failed if code != ExitCode.PEER_LOST]
    return (causes or failed or [int(ExitCode.SAVED_RUN_AGAIN)])[0]


@contextlib.contextmanager
def _forwarding() -> Iterator[None]:
    """Hands signals to the ranks, which are the only children that this process has."""

    def forward(number: int, _frame: object) -> None:
        for rank in psutil.Process(os.getpid()).children():
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
