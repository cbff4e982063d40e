"""Worker processes around the stream: micro-batches in plan order, and how long they were awaited.

Workers hold no state worth saving: what a micro-batch contains depends on its plan alone. Any
number of them gives the same micro-batches, and a resume starts them at the next step's plan.
"""

import atexit
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from pipeline.clip import ClipBatch
from pipeline.data.blocks import SharedMemory
from pipeline.data.casualties import Casualties
from pipeline.data.clips import LoadClip, make_order, open_sources
from pipeline.data.crew import Crew, WorkersDiedError
from pipeline.data.settings import DataConfig
from pipeline.data.stream import Collate, Plans, micro_batches
from pipeline.errors import DataError


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
    return Loader(CrewStart(load_clip=load_clip, plans=plans, collate=collate, pin=pin))


@dataclass(frozen=True, kw_only=True, slots=True)
class CrewStart:
    """Starts workers, the first ones or others in their place."""

    load_clip: LoadClip
    plans: Plans
    collate: Collate
    pin: bool

    def __call__(self, skip: int, deadly: dict[tuple[int, int], str]) -> Crew:
        """Workers that begin behind the first `skip` plans and leave `deadly` samples out."""
        config = self.load_clip.config
        # Per worker: those ready, the one in training, and the one before it, let go a step later.
        memory = SharedMemory.make(config.workers, config.prefetch + 2)
        load_clip = replace(self.load_clip, deadly=dict(deadly))
        stream = micro_batches(self.plans, load_clip, self.collate, memory, skip)
        return Crew(stream, config, memory, pin=self.pin)


class Loader:
    """An iterator over one rank's micro-batches; its workers live until `close`.

    Attributes:
        wait_seconds: How long the last `next()` waited for its micro-batch.
    """

    def __init__(self, start: CrewStart) -> None:
        self.wait_seconds = 0.0
        self._start = start
        self._budget = ErrorBudget(start.load_clip.config)
        self._casualties = Casualties(start.load_clip)
        self._notices = [
            f"{dataset.path}: {damage}"
            for dataset in start.load_clip.datasets
            for damage in dataset.damaged.values()
        ]
        self._delivered = 0
        self._crew: Crew | None = start(0, {})
        # Before multiprocessing's own exit handler, which would wait for workers for ever.
        atexit.register(self.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ClipBatch:
        """The next micro-batch of the plan.

        Raises:
            StopIteration: The plans are done, or the loader is closed.
            DataError: Too many bad samples, or too many workers died.
        """
        begin = time.monotonic()
        batch = self._next_batch()
        self.wait_seconds = time.monotonic() - begin
        self._delivered += 1
        self._budget.charge(batch)
        return batch

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers at work."""
        return [process.pid for process in self._crew.processes] if self._crew else []

    def take_notices(self) -> list[str]:
        """Damaged shards and lost workers since the last call, one line each."""
        notices, self._notices = self._notices, []
        return notices

    def close(self) -> None:
        """End the workers, within seconds also if one hangs."""
        atexit.unregister(self.close)
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _next_batch(self) -> ClipBatch:
        while self._crew is not None:
            try:
                return self._crew.next()
            except WorkersDiedError as error:
                self._replace(self._crew, error)
        raise StopIteration

    def _replace(self, crew: Crew, error: WorkersDiedError) -> None:
        """New workers go on at the first micro-batch that was not delivered."""
        lost = self._casualties.count(error.deaths)
        crew.close(at_once=True)
        notice = f"{lost}, restarted behind micro-batch {self._delivered}"
        # Only the first rank keeps events; the log of each rank has its own workers' story.
        sys.stderr.write(f"loader: {notice}\n")
        self._notices.append(notice)
        self._crew = self._start(self._delivered, self._casualties.deadly)


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
