"""One generation of loader workers: started together, watched, ended together.

Workers hold no state, so there is nothing to mend in one that died: all of them are ended and a
new crew goes on at the first micro-batch that was not delivered. Their queues go with them, since
a worker that is killed may leave a lock held or half a message behind.
"""

import multiprocessing.connection
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline.clip import ClipBatch
from pipeline.data import worker
from pipeline.data.blocks import Returns, Sent, SharedMemory
from pipeline.data.settings import DataConfig
from pipeline.errors import JepaError

# Workers finish the clip they are at; they hold nothing worth waiting for any longer.
_CLOSE_SECONDS = 5.0
_DEATH_SECONDS = 2.0
# How long a dead worker can go unnoticed; torch's own interval is five seconds.
_POLL_SECONDS = 1.0
_TIMED_OUT = "DataLoader timed out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A worker that ended unexpectedly."""

    worker: int
    exit_code: int
    at: tuple[int, int] | None
    """Global position and attempt that it was loading, if it was loading one."""


class WorkersDiedError(Exception):
    """Some workers of a crew died; the crew can only be closed."""

    def __init__(self, deaths: tuple[Death, ...]) -> None:
        super().__init__(deaths)
        self.deaths = deaths


class Crew:
    """The workers of one rank, or the decoding in the training process itself if there are none.

    Args:
        stream: What every worker runs.
        config: The run's data section.
        memory: What is shared with the workers.
        pin: Move micro-batches to page-locked memory.
    """

    def __init__(
        self,
        stream: IterableDataset[Sent | JepaError],
        config: DataConfig,
        memory: SharedMemory,
        *,
        pin: bool,
    ) -> None:
        self._returns = Returns(memory.blocks.in_use_WN)
        self._at_W2 = memory.at_W2
        self._batches: Any = iter(_data_loader(stream, config, pin=pin))
        # A private list, but the only way to learn a worker's exit code and to end one that
        # hangs; absent without workers.
        self.processes = list(getattr(self._batches, "_workers", ()))

    def next(self) -> ClipBatch:
        """The next micro-batch.

        Raises:
            StopIteration: There is none.
            WorkersDiedError: A worker died.
            JepaError: What ended the pipeline in a worker.
        """
        self._returns.collect()
        item = self._next_item()
        if isinstance(item, JepaError):
            raise item
        return self._returns.receive(item)

    def close(self, *, at_once: bool = False) -> None:
        """End the workers, within seconds also if one hangs; `at_once` lets none finish a clip."""
        if at_once:
            _kill(self.processes)
        batches, self._batches = self._batches, None
        # Private as well: the public way is to delete the iterator, which waits without a limit
        # if a worker was killed while it held the queue's lock.
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            closing = threading.Thread(target=shutdown, daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)
        _kill(self.processes)
        self.processes = []

    def _next_item(self) -> Sent | JepaError:
        while True:
            try:
                return next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                # An OSError if the worker died while its memory was being handed over; then its
                # exit code may not have come yet.
                deaths = self._deaths(0.0 if isinstance(error, RuntimeError) else _DEATH_SECONDS)
                if deaths:
                    raise WorkersDiedError(deaths) from error
                if not str(error).startswith(_TIMED_OUT):
                    raise

    def _deaths(self, wait_seconds: float) -> tuple[Death, ...]:
        multiprocessing.connection.wait([p.sentinel for p in self.processes], wait_seconds)
        pairs = zip(self.processes, self._at_W2.tolist(), strict=True)
        return tuple(
            Death(
                worker=number,
                exit_code=process.exitcode,
                at=(position, attempt) if position >= 0 else None,
            )
            for number, (process, (position, attempt)) in enumerate(pairs)
            if process.exitcode not in (None, 0)
        )


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _data_loader(
    stream: IterableDataset[Sent | JepaError], config: DataConfig, *, pin: bool
) -> DataLoader[Sent | JepaError]:
    always: dict[str, Any] = {
        "batch_size": None,
        "collate_fn": _as_it_is,
        "pin_memory": pin,
        # It draws a seed, which must not come from the generator that weights are drawn from.
        "generator": torch.Generator(),
    }
    if config.workers == 0:
        return DataLoader(stream, **always)
    return DataLoader(
        stream,
        **always,
        num_workers=config.workers,
        prefetch_factor=config.prefetch,
        timeout=_POLL_SECONDS,
        multiprocessing_context=worker.start_server(),
        worker_init_fn=worker.begin,
    )


def _as_it_is(item: Any) -> Any:
    """The stream has collated already; DataLoader's default would look into the item."""
    return item
