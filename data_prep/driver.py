"""The Ray driver: hands parts to workers, a bounded number at a time, and survives their deaths.

A worker that dies costs its part only: the part is done again, and a video at which workers died
twice is left out and reported. Ray itself never retries, because it would not know which video
to blame.
"""

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep.ledger import Ledger
from data_prep.part import PartJob, PartReport, prepare_part
from pipeline.cluster import local_ray
from pipeline.errors import DataError, JepaError

# One part waits at each worker, so that none stands still between two.
_PARTS_PER_CPU = 2
_POLL_SECONDS = 1.0
_DEATHS_PER_SOURCE = 2
_DEATHS_WITHOUT_SOURCE = 3
# A worker is at a video for two passes at most; after that it hangs inside the decoder.
_PASSES = 2
_SLACK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Where the work is done."""

    num_cpus: int | None = None
    """Workers on this machine; its cores by default."""
    address: str | None = None
    """A running Ray cluster to join instead."""


def run_parts(
    jobs: Sequence[PartJob], workers: Workers, on_done: Callable[[PartReport], None]
) -> None:
    """Prepares all parts; `on_done` gets each report as it comes, in any order.

    Raises:
        StorageError: The dataset's folder cannot be written.
        DataError: Workers die again and again before they reach a video.
        Stopped: On SIGTERM; a Ctrl-C is the KeyboardInterrupt it always is.
    """
    if not jobs:
        return
    with local_ray(workers.num_cpus, workers.address) as ray, _stopped_by_sigterm():
        _Crew(ray, jobs).run(on_done)


class Stopped(KeyboardInterrupt):
    """A scheduler asked this process to end; finished parts are kept."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Ray's own handler ends the process on the spot and leaves its files behind."""
    received: list[int] = []

    def stop(*signal_and_frame: Any) -> None:
        received.append(signal_and_frame[0])
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        # Ray turns what a handler raises into a plain KeyboardInterrupt.
        if received:
            raise Stopped from error
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Crew:
    """The parts that wait, those in flight, and how often a worker died at what."""

    def __init__(self, ray: ModuleType, jobs: Sequence[PartJob]) -> None:
        self._ray = ray
        self._task = ray.remote(num_cpus=1, max_retries=0)(prepare_part)
        self._waiting = deque(jobs)
        self._running: dict[Any, PartJob] = {}
        self._deaths: Counter[tuple[int, str]] = Counter()
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        self._max_running = max(2, _PARTS_PER_CPU * num_cpus)

    def run(self, on_done: Callable[[PartReport], None]) -> None:
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._max_running:
                job = self._waiting.popleft()
                self._running[self._task.remote(job)] = job
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_SECONDS)
            for task in done:
                report = self._outcome(task, self._running.pop(task))
                if report is not None:
                    on_done(report)
            self._end_hanging()

    def _outcome(self, task: Any, job: PartJob) -> PartReport | None:
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
            self._waiting.appendleft(self._after_death(job, error))
            return None

    def _after_death(self, job: PartJob, error: Exception) -> PartJob:
        marker = Ledger(Path(job.dataset_dir)).marker_path(job.number)
        source = marker.read_text() if marker.exists() else ""
        marker.unlink(missing_ok=True)
        self._deaths[job.number, source] += 1
        deaths = self._deaths[job.number, source]
        if source and deaths >= _DEATHS_PER_SOURCE:
            return replace(job, deadly=job.deadly | {source})
        if not source and deaths >= _DEATHS_WITHOUT_SOURCE:
            raise DataError(
                f"part {job.number}: its worker died {deaths} times before its first video: "
                f"{str(error).splitlines()[0]}",
                remedy="Look for a lack of memory; --workers 1 needs less.",
            ) from error
        return job

    def _end_hanging(self) -> None:
        for task, job in self._running.items():
            marker = Ledger(Path(job.dataset_dir)).marker_path(job.number)
            limit = _PASSES * job.settings.time_limit_seconds + _SLACK_SECONDS
            try:
                hangs = time.time() - marker.stat().st_mtime > limit
            except FileNotFoundError:
                continue
            if hangs:
                self._ray.cancel(task, force=True)
