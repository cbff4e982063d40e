"""Worker processes around the stream: micro-batches in plan order, and how long they were awaited.

Workers hold no state worth saving: what a micro-batch contains depends on its plan alone. Any
number of them gives the same micro-batches, and a resume starts them at the next step's plan.
"""

import atexit
import multiprocessing.connection
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline.clip import ClipBatch
from pipeline.data import worker
from pipeline.data.blocks import Returns, Sent, SharedMemory
from pipeline.data.clips import LoadClip, make_order, open_sources
from pipeline.data.settings import DataConfig
from pipeline.data.stream import Collate, Plans, micro_batches
from pipeline.errors import DataError, JepaError

# Workers finish the clip they are at; they hold nothing worth waiting for any longer.
_CLOSE_SECONDS = 5.0
_DEATH_SECONDS = 2.0


def make_loader(
    config: DataConfig, *, plans: Plans, collate: Collate, seed: int, pin: bool = False
) -> "Loader":
    """Open the datasets and start the workers.

    Args:
        config: The run's data section.
        plans: This rank's micro-batches in the order of training, all stages together. With
            workers it is pickled: give a sequence, or a function such as a `functools.partial`
            of a generator function, which every worker calls for itself.
        collate: Makes one `ClipBatch` of clips and their plan; picklable.
        seed: The run's seed.
        pin: Move micro-batches to page-locked memory, for asynchronous copies to a GPU.

    Raises:
        UsageError: A source is no finished dataset.
        DataError: A dataset does not agree with its manifest.
        ConfigError: The weights do not fit the mixture.
    """
    if isinstance(plans, Iterator):
        plans = tuple(plans)
    datasets = open_sources(config)
    order = make_order(config, datasets, seed)
    load_clip = LoadClip(config=config, order=order, datasets=datasets)
    # Per worker: those ready, the one in training, and the one before it, let go a step later.
    memory = SharedMemory.make(config.workers, config.prefetch + 2)
    stream = micro_batches(plans, load_clip, collate, memory)
    return Loader(_data_loader(stream, config, pin=pin), memory, load_clip)


class Loader:
    """An iterator over one rank's micro-batches; its workers live until `close`.

    Attributes:
        wait_seconds: How long the last `next()` waited for its micro-batch.
    """

    def __init__(
        self, data_loader: DataLoader[Sent | JepaError], memory: SharedMemory, load_clip: LoadClip
    ) -> None:
        self.wait_seconds = 0.0
        self._budget = ErrorBudget(load_clip.config)
        self._returns = Returns(memory.blocks.in_use_WN)
        self._position_W = memory.position_W
        self._describe = load_clip.describe
        self._batches: Iterator[Any] | None = iter(data_loader)
        # A private list, but the only way to learn a worker's exit code and to end one that
        # hangs; absent without workers.
        self._workers = list(getattr(self._batches, "_workers", ()))
        # Before multiprocessing's own exit handler, which would wait for workers for ever.
        atexit.register(self.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ClipBatch:
        """The next micro-batch of the plan.

        Raises:
            StopIteration: The plans are done, or the loader is closed.
            DataError: Too many bad samples, or a worker died.
        """
        if self._batches is None:
            raise StopIteration
        self._returns.collect()
        begin = time.monotonic()
        try:
            item = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            # An OSError if the worker died while its memory was being handed over; then its exit
            # code may not have come yet.
            deaths = self._deaths(0.0 if isinstance(error, RuntimeError) else _DEATH_SECONDS)
            if not deaths:
                raise
            raise _worker_died(deaths) from error
        self.wait_seconds = time.monotonic() - begin
        if isinstance(item, JepaError):
            raise item
        batch = self._returns.receive(item)
        self._budget.charge(batch)
        return batch

    def close(self) -> None:
        """End the workers, within seconds also if one hangs."""
        atexit.unregister(self.close)
        batches, self._batches = self._batches, None
        # Private as well: the public way is to delete the iterator, which waits without a limit
        # if a worker was killed while it held the queue's lock.
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            closing = threading.Thread(target=shutdown, daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)
        for process in self._workers:
            if process.is_alive():
                process.kill()
            process.join()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _deaths(self, wait_seconds: float) -> list[tuple[int, str]]:
        """Exit code of every worker that died, and the sample that it was at."""
        multiprocessing.connection.wait([p.sentinel for p in self._workers], wait_seconds)
        return [
            (process.exitcode, self._describe(position) if position >= 0 else "its first sample")
            for process, position in zip(self._workers, self._position_W.tolist(), strict=True)
            if process.exitcode not in (None, 0)
        ]


class ErrorBudget:
    """Counts one rank's bad samples and says when there are too many."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.num_clips = 0
        self.num_bad = 0

    def charge(self, batch: ClipBatch) -> None:
        """Count a micro-batch.

        Raises:
            DataError: More bad samples than both limits of the configuration allow.
        """
        self.num_clips += len(batch.keys)
        self.num_bad += len(batch.faults)
        allowed = max(
            self.config.max_bad_samples, int(self.config.max_bad_fraction * self.num_clips)
        )
        if self.num_bad > allowed:
            last = batch.faults[-1]
            error = DataError(
                f"{self.num_bad} bad samples in {self.num_clips} clips, allowed are {allowed}; the "
                f"last one, {last.key} in {last.dataset}/{last.shard}: {last.reason}",
                remedy="Prepare the dataset again, or raise data.max_bad_fraction if it is meant.",
            )
            error.faults = batch.faults
            raise error


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
        multiprocessing_context=worker.start_server(),
        worker_init_fn=worker.begin,
    )


def _worker_died(deaths: list[tuple[int, str]]) -> DataError:
    causes = "; ".join(f"{worker.cause_of_death(code)}, at {sample}" for code, sample in deaths)
    if any(code in worker.OUT_OF_MEMORY for code, _ in deaths):
        remedy = (
            "Use fewer data.workers, a smaller data.prefetch or a larger /dev/shm (a container's "
            "default is 64 MiB), then resume."
        )
    else:
        remedy = "Resume; if it dies there again, prepare the dataset without this video."
    return DataError(f"A loader worker died: {causes}.", remedy=remedy)


def _as_it_is(item: Any) -> Any:
    """The stream has collated already; DataLoader's default would look into the item."""
    return item
