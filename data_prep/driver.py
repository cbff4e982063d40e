"""The Ray driver: hands work to workers, a bounded number at a time, and survives their deaths.

A worker that dies costs the item in hand only: it is done again, and a source at which workers
died twice is refused and reported. Ray itself never retries, because it would not know which
source to blame.
"""

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from data_prep.item import ItemDone, ItemJob, prepare_item
from data_prep.pack import ShardJob, pack_shard
from pipeline.errors import DataError, JepaError

# One job waits at each worker, so that none stands still between two; no more are in memory.
_JOBS_PER_CPU = 2
_POLL_SECONDS = 1.0
# Of a thousand markers on a network's file system, each look costs a second.
_LOOK_SECONDS = 2.0
_DEATHS_PER_ITEM = 2
# A lost machine takes dozens of workers with it, of which one at most is to blame.
_MACHINES_PER_ITEM = 4
# In a row, none of them at a source.
_DEATHS_WITHOUT_ITEM = 3
# A worker is at a source for three passes at most, and may have to fetch it over a slow line; after
# that it hangs inside the decoder.
_PASSES = 3
_SLACK_SECONDS = 60.0
_LEAST_BYTES_PER_SECOND = 1e6

Job = TypeVar("Job", ItemJob, ShardJob)
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Where the work is done."""

    num_cpus: int | None = None
    """Workers on this machine; its cores by default."""
    address: str | None = None
    """A running Ray cluster to join instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResources:
    """What one task of a stage asks Ray for."""

    num_cpus: float


# Decoder and encoder run on one thread; whoever packs waits for the disk most of the time.
ITEM_RESOURCES = StageResources(num_cpus=1)
SHARD_RESOURCES = StageResources(num_cpus=0.5)
_STOPPING = (signal.SIGTERM, signal.SIGUSR2)


class Stopped(KeyboardInterrupt):
    """A scheduler asked this process to end; finished items are kept."""


def run_items(
    ray: ModuleType, jobs: Iterator[ItemJob], on_done: Callable[[ItemDone], None]
) -> None:
    """Prepares all items; `on_done` gets each record as it comes, in any order.

    `jobs` is asked for the next one only when a worker can take it.

    Raises:
        StorageError: The dataset's folder cannot be written.
        DataError: Workers die again and again before they reach a source.
    """
    _Items(ray, prepare_item, ITEM_RESOURCES, jobs).run(on_done)


def run_shards(ray: ModuleType, jobs: Iterator[ShardJob], on_done: Callable[[int], None]) -> None:
    """Packs all shards; `on_done` gets each one's number as it is published, in any order.

    Raises:
        StorageError: The dataset's folder cannot be read or written.
        DataError: An item is not what it was, or workers die again and again.
    """
    _Crew(ray, pack_shard, SHARD_RESOURCES, jobs).run(on_done)


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Ray's own handler ends the process on the spot and leaves its files behind.

    Raises:
        Stopped: On SIGTERM, or SIGUSR2, by which a job is warned of its time limit; a Ctrl-C is the
            KeyboardInterrupt it always is.
    """
    received: list[int] = []

    def stop(*signal_and_frame: Any) -> None:
        received.append(signal_and_frame[0])
        for number in _STOPPING:
            signal.signal(number, signal.SIG_IGN)  # reminders must not tear what is in order
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield
    except KeyboardInterrupt as error:
        # Ray turns what a handler raises into a plain KeyboardInterrupt.
        if received:
            raise Stopped from error
        raise
    finally:
        if not received:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Crew(Generic[Job, Result]):
    """The jobs in flight, and how often workers died."""

    def __init__(
        self,
        ray: ModuleType,
        function: Callable[[Job], Result],
        resources: StageResources,
        jobs: Iterator[Job],
    ) -> None:
        self._ray = ray
        self._task = ray.remote(num_cpus=resources.num_cpus, max_retries=0)(function)
        self._jobs = jobs
        self._again: deque[Job] = deque()
        self._running: dict[Any, Job] = {}
        self._deaths: Counter[str] = Counter()
        num_at_a_time = int(ray.cluster_resources().get("CPU", 1) / resources.num_cpus)
        self._max_running = max(2, _JOBS_PER_CPU * num_at_a_time)

    def run(self, on_done: Callable[[Result], None]) -> None:
        """Until nothing waits and nothing runs.

        What is in flight when something goes wrong is left to end with Ray: it may still publish,
        and would publish what the next run does. To cancel it has a race in Ray that aborts the
        driver when a task completes at that moment.
        """
        looked = time.monotonic()
        while self._fill() or self._running:
            for task in self._finished():
                result = self._outcome(task, self._running.pop(task))
                if result is not None:
                    del self._deaths[""]
                    on_done(result)
            if time.monotonic() - looked > _LOOK_SECONDS:
                self.end_hanging(self._running)
                looked = time.monotonic()

    def after_death(self, job: Job, error: Exception) -> Job:
        """What to do again after the worker of a job died."""
        if not isinstance(error, self._ray.exceptions.NodeDiedError):
            self.count_death("", _DEATHS_WITHOUT_ITEM, error)
        return job

    def end_hanging(self, running: dict[Any, Job]) -> None:
        """Ends workers that have been at a job for longer than it can take."""

    def count_death(self, blamed: str, limit: int, error: Exception) -> bool:
        """Whether this is one death too many; an error if nobody is to blame for them."""
        self._deaths[blamed] += 1
        if self._deaths[blamed] < limit:
            return False
        if blamed:
            return True
        raise DataError(
            f"workers died {limit} times without having begun: {str(error).splitlines()[0]}",
            remedy="Look for a lack of memory; --workers 1 needs less.",
        ) from error

    def _fill(self) -> bool:
        while len(self._running) < self._max_running:
            job = self._again.popleft() if self._again else next(self._jobs, None)
            if job is None:
                return False
            self._running[self._task.remote(job)] = job
        return True

    def _finished(self) -> list[Any]:
        """All tasks that have ended by now; waits for one, but not for ever."""
        tasks = list(self._running)
        done, others = self._ray.wait(tasks, num_returns=1, timeout=_POLL_SECONDS)
        if done and others:
            # In one call: with a thousand workers, one for each would be most of the driver's time.
            done += self._ray.wait(others, num_returns=len(others), timeout=0)[0]
        return done

    def _outcome(self, task: Any, job: Job) -> Result | None:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            # Ray's own text buries our message in a traceback of its internals.
            if isinstance(error.cause, JepaError):
                raise error.cause from None
            raise
        except (
            errors.WorkerCrashedError,
            errors.TaskCancelledError,
            errors.OutOfMemoryError,
            errors.NodeDiedError,
        ) as error:
            self._again.append(self.after_death(job, error))
            return None


class _Items(_Crew[ItemJob, ItemDone]):
    """Items, of which one may kill whoever works on it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._begun: dict[str, float] = {}

    def after_death(self, job: ItemJob, error: Exception) -> ItemJob:
        """Blames the source if its worker had begun with it; less if its machine was lost."""
        marker = Path(job.marker)
        begun = marker.exists()
        marker.unlink(missing_ok=True)
        self._begun.pop(job.item, None)
        if not begun:
            return super().after_death(job, error)
        if isinstance(error, self._ray.exceptions.NodeDiedError):
            is_last = self.count_death(f"{job.item} and its machine", _MACHINES_PER_ITEM, error)
            why = "with its machine, time and again, while at this source"
        else:
            is_last = self.count_death(job.item, _DEATHS_PER_ITEM, error)
            why = "twice, while at this source"
        return replace(job, refuse=why) if is_last else job

    def end_hanging(self, running: dict[Any, ItemJob]) -> None:
        """Ends workers whose marker has been there for too long by the driver's own clock."""
        now = time.monotonic()
        there = {job.item for job in running.values() if Path(job.marker).exists()}
        self._begun = {item: self._begun.get(item, now) for item in there}
        for task, job in running.items():
            limit = _PASSES * job.settings.time_limit_seconds + _SLACK_SECONDS
            limit += job.source.num_bytes / _LEAST_BYTES_PER_SECOND
            if job.item in there and now - self._begun[job.item] > limit:
                self._ray.cancel(task, force=True)
