"""Loader workers: how they start, what they ignore, when they end themselves.

Workers are forked from multiprocessing's fork server, which imports this module once per rank.
They start in milliseconds and share the memory of what is imported here, while the training
process, with its process group, threads and CUDA context, is never forked.
"""

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import TypeVar

Item = TypeVar("Item")

# Exit codes of a worker that the machine or the container had no memory left for.
OUT_OF_MEMORY = (-signal.SIGKILL, -signal.SIGBUS)
# Sent by the kernel when a decode has used up its processor time.
OUT_OF_TIME = -signal.SIGPROF
# Slurm, Kubernetes and terminals signal whole process groups. The training process alone decides
# what a signal means, and it needs its workers until the last step is saved.
_SIGNALS_OF_THE_TRAINER = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
# A thread that a library starts in the server is lost in the workers, and none is needed there.
_SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def start_server() -> ForkServerContext:
    """Begin to import what workers need, in the background; does nothing the second time.

    Called early in a start-up, it hides two seconds of imports behind the building of the model.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__ + "_imports"])
    # It unblocks SIGTERM when it starts, so it has to run before the signals are blocked.
    resource_tracker.ensure_running()
    with _surroundings_of_the_server():
        forkserver.ensure_running()
    return context


def begin(_worker_id: int) -> None:
    """What a worker does first; DataLoader's `worker_init_fn`."""
    # Blocked already if our server is the one that runs, but another library may have started it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_TRAINER)
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        # DataLoader watches for another parent process, but a forked worker's parent is the
        # server, which lives as long as one of its workers: both would stay for ever.
        threading.Thread(target=_die_with, args=(trainer,), daemon=True).start()


def with_deadline(items: Iterable[Item], seconds: float) -> Iterator[Item]:
    """Pass items on; if one takes too long, print where it hangs and end the process."""
    iterator = iter(items)
    while True:
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            item = next(iterator, None)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if item is None:
            return
        yield item


def cause_of_death(exit_code: int | None) -> str:
    """What an exit code says about a worker that ended unexpectedly."""
    if exit_code == -signal.SIGKILL:
        return "killed by SIGKILL (the machine or container most likely ran out of memory)"
    if exit_code == -signal.SIGBUS:
        return "killed by SIGBUS (no space left in shared memory, /dev/shm)"
    if exit_code == OUT_OF_TIME:
        return "killed by SIGPROF (its decoder took more processor time than it may)"
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code} (its last words are in the log above)"


def _die_with(trainer: BaseProcess) -> None:
    trainer.join()
    os._exit(1)


@contextmanager
def _surroundings_of_the_server() -> Iterator[None]:
    """Signal mask and variables that the server, and with it every worker, inherits."""
    before = {name: os.environ.get(name) for name in _SERVER_ENVIRONMENT}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_TRAINER)
    os.environ.update(_SERVER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        # A signal that came meanwhile is delivered now; an ignored one would have been lost.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
