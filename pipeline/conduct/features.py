"""Features of a probe over several Ray workers: each takes a chunk at a time, none is lost twice.

A chunk that is whole on disk stays whatever happens to a worker or to this process. The workers
share the folder of the cache, so across machines it must lie on storage that all of them see.
"""

import os
from collections import Counter, deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.cluster import local_ray
from pipeline.conduct.tasks import TaskNeeds, lost
from pipeline.errors import JepaError, UsageError
from pipeline.probe.chunks import encode_chunk
from pipeline.probe.parts import Stored, stored_extractions
from pipeline.probe.records import ProbeProgress, ProbeRequest, Report

_MOST_DEATHS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTask:
    """A chunk of one of a probe's splits."""

    split: int
    number: int
    num_videos: int


def encode_on_workers(
    request: ProbeRequest,
    *,
    workers: int,
    needs: TaskNeeds,
    report: Report,
    address: str | None = None,
) -> int:
    """Encodes what a probe keeps on disk and is not there yet, over several workers.

    The content of a chunk does not depend on who encodes it; give every worker the same number
    of CPUs, and any number of workers leaves the same bytes.

    Args:
        request: The probe.
        workers: Workers at a time.
        needs: What each of them takes.
        report: Told videos done and their total.
        address: Ray cluster to join instead of starting one.

    Returns:
        The number of chunks that were encoded.

    Raises:
        JepaError: What a worker raised.
        PeerLostError: Workers died over one and the same chunk three times.
    """
    with local_ray(num_cpus=workers * needs.num_cpus, address=address) as ray:
        crew = _Crew(ray, request, needs)
        try:
            waiting = deque(crew.missing())
            return crew.encode(waiting, workers, report)
        finally:
            crew.dismiss()


class FeatureWorker:
    """Runs in a Ray actor: one frozen encoder, and the chunks it is given."""

    def __init__(self, folder: str, request: ProbeRequest) -> None:
        self._folder, self._request = folder, request

    @cached_property
    def _stored(self) -> list[Stored]:
        # Not in the constructor: what that raises reaches the driver as text alone.
        try:
            # Relative paths mean the same here as where the command was given.
            os.chdir(self._folder)
        except OSError as error:
            raise UsageError(
                f"this machine does not see {self._folder}, where the command was given",
                remedy="Give absolute paths on storage that all machines of the cluster share.",
            ) from error
        return stored_extractions(self._request)

    def missing(self) -> list[ChunkTask]:
        """The chunks that are not there, or not whole."""
        return [
            ChunkTask(split=split, number=number, num_videos=len(stored.asked.chunks()[number]))
            for split, stored in enumerate(self._stored)
            for number in stored.missing()
        ]

    def encode(self, task: ChunkTask) -> int:
        """Encodes one chunk; returns its videos."""
        stored = self._stored[task.split]
        encode_chunk(stored.asked, stored.folder, task.number)
        return task.num_videos


class _Crew:
    """The living workers, what each is at, and how often a chunk has cost one its life."""

    def __init__(self, ray: ModuleType, request: ProbeRequest, needs: TaskNeeds) -> None:
        self._ray, self._request, self._needs = ray, request, needs
        self._actors: list[Any] = []
        self._at_work: dict[Any, tuple[Any, ChunkTask]] = {}
        self._deaths: Counter[tuple[int, int]] = Counter()

    def missing(self) -> list[ChunkTask]:
        """Asked of the first worker: this process loads no encoder."""
        return self._get(self._hire().missing.remote())

    def encode(self, waiting: deque[ChunkTask], workers: int, report: Report) -> int:
        total, done, num_chunks = sum(t.num_videos for t in waiting), 0, len(waiting)
        phase = f"{self._request.label}: encode on {workers} workers"
        while len(self._actors) < min(workers, num_chunks):
            self._hire()
        for actor in self._actors:
            self._give(actor, waiting)
        while self._at_work:
            (reference,), _ = self._ray.wait(list(self._at_work), num_returns=1)
            actor, task = self._at_work.pop(reference)
            try:
                done += self._get(reference)
            except self._ray.exceptions.RayActorError as error:
                actor = self._replace(actor, task, error)
                waiting.appendleft(task)
            report(ProbeProgress(phase=phase, done=done, total=total))
            self._give(actor, waiting)
        return num_chunks

    def dismiss(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def _hire(self) -> Any:
        remote = self._ray.remote(
            num_cpus=self._needs.num_cpus, num_gpus=self._needs.num_gpus, max_restarts=0
        )(FeatureWorker)
        actor = remote.remote(str(Path.cwd()), self._request)
        self._actors.append(actor)
        return actor

    def _give(self, actor: Any, waiting: deque[ChunkTask]) -> None:
        if waiting:
            task = waiting.popleft()
            self._at_work[actor.encode.remote(task)] = (actor, task)

    def _replace(self, actor: Any, task: ChunkTask, error: Exception) -> Any:
        """A worker for one that died; the chunk it was at is all that has to be done again."""
        self._actors.remove(actor)
        place = (task.split, task.number)
        self._deaths[place] += 1
        if self._deaths[place] >= _MOST_DEATHS:
            raise lost(f"{self._needs.describe}, chunk {task.number}", str(error)) from error
        return self._hire()

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, JepaError):
                raise error.cause from error
            raise
