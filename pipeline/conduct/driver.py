"""The conductor: looks at runs, gives jobs to Ray, notes how they ended, until all is done."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from types import ModuleType
from typing import Any

from pipeline.conduct import work
from pipeline.conduct.follow import Follow
from pipeline.conduct.jobs import Job, Seen
from pipeline.conduct.pool import Ended, Pool
from pipeline.conduct.prepare import export_folder, export_request, probe_request
from pipeline.conduct.settings import ConductConfig, Resources
from pipeline.conduct.stop import StopSignals
from pipeline.conduct.tasks import TaskNeeds
from pipeline.errors import ConfigError, StorageError
from pipeline.track.lease import OwnerError

# Of a wait on Ray: a signal is obeyed within this.
_WAIT_SECONDS = 0.5
_LIGHT = Resources()


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """How the conductor ended."""

    stopped_by: str | None
    """The signal that ended it; None if it came to its end."""
    num_open: int
    """Jobs that are left for the next start."""
    num_lost: int
    """Jobs that were given up, and damaged checkpoints: a person has to look."""
    goes_on: bool
    """Whether a run may still write checkpoints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Label:
    """What the pool calls a job; no job is the run's verdict and report."""

    follow: Follow
    job: Job | None


class Conductor:
    """Works for several runs at a time.

    Args:
        follows: The runs.
        config: What to do.
        ray: From `cluster.local_ray`.
        stop: Which end it early.
        tell: Called with a line for people whenever something begins or ends.
    """

    def __init__(
        self,
        follows: Sequence[Follow],
        config: ConductConfig,
        ray: ModuleType,
        stop: StopSignals,
        tell: Callable[[str], None],
    ) -> None:
        self._follows, self._config, self._tell = list(follows), config, tell
        self._pool, self._stop = Pool(ray, config.nice), stop
        self._judged: dict[Follow, float] = {}
        self._judging: set[Follow] = set()

    def run(self, *, once: bool) -> Summary:
        """Works until all runs have finished and everything is done, or a signal comes.

        Args:
            once: End when everything is done that can be now, whether or not runs go on.
        """
        self._stop.listen()  # Ray has taken some signals for itself
        while not self._stop.is_set:
            self._begin(self._ready(once=once))
            self._judge(once=once)
            if not self._wait() and (once or self._is_over()):
                break
        self._pool.cancel()
        return summed_up(self._follows, once=once, stopped_by=self._stop.name)

    def _ready(self, *, once: bool) -> list[tuple[Follow, Job]]:
        """What can begin now, the most urgent of every run first."""
        columns: list[list[tuple[Follow, Job]]] = []
        for follow in list(self._follows):
            try:
                columns.append([(follow, job) for job in follow.look()])
            except OwnerError as error:
                self._follows.remove(follow)
                is_there = follow.run_dir.is_dir()
                why = f"is left to another conductor: {error}" if is_there else "is there no more"
                self._tell(f"{follow.run_dir} {why}")
            except StorageError as error:
                if once:
                    raise
                self._tell(f"{follow.run_dir}: {error}; looking again")
        return [pair for row in zip_longest(*columns) for pair in row if pair is not None]

    def _begin(self, ready: Sequence[tuple[Follow, Job]]) -> None:
        for follow, job in ready[: max(0, self._config.jobs_at_once - len(self._pool))]:
            seen = follow.begin(job)
            function, arguments, needs = self._work(follow, job, seen)
            self._pool.submit(_Label(follow=follow, job=job), function, *arguments, needs=needs)
            self._tell(f"{follow.run_dir.name}: {job.words} begins")

    def _work(
        self, follow: Follow, job: Job, seen: Seen | None
    ) -> tuple[Callable[..., Any], tuple[Any, ...], TaskNeeds]:
        """The function that does a job, its arguments, and what it takes."""
        path = seen.path if seen is not None else follow.run_dir
        steps = [commit.step for commit in follow.commits]
        mirror, export = self._config.mirror, self._config.export
        resources: Resources = _LIGHT
        work_of: tuple[Callable[..., Any], tuple[Any, ...]]
        if job.kind == "mirror" and mirror is not None:
            work_of = work.mirror_checkpoint, (path, mirror.url, max(steps))
        elif job.kind == "unmirror" and mirror is not None:
            work_of = work.unmirror_checkpoint, (follow.run_dir, mirror.url, job.step)
        elif job.kind == "export" and export is not None:
            out = export_folder(follow.run_dir, export, job.step, job.name)
            work_of = work.export_checkpoint, (path, out, export_request(job, export))
        elif job.kind == "probe" and seen is not None:
            probe = follow.probes[job.name]
            resources = probe.config
            work_of = work.probe_checkpoint, (probe_request(follow.run_dir, seen, probe),)
        elif job.kind == "record":
            track = follow.run_config.track
            work_of = work.record_scores, (follow.run_dir, track, follow.status)
        else:
            work_of = work.verify_checkpoint, (path, follow.run_id)
        return *work_of, _needs(resources, f"{follow.run_dir.name} {job.words}")

    def _judge(self, *, once: bool) -> None:
        """Has runs judged and reported on again that something was found out of."""
        for follow in self._follows:
            since = time.monotonic() - self._judged.get(follow, -math.inf)
            is_quiet = not follow.open_jobs() and (once or follow.is_finished)
            is_due = is_quiet or since >= 60.0 * self._config.report_every_minutes
            if follow.has_news and is_due and follow not in self._judging:
                follow.begin_judging()
                self._judged[follow] = time.monotonic()
                self._judging.add(follow)
                function = partial(work.update_report, with_page=self._config.report)
                needs = _needs(_LIGHT, f"{follow.run_dir.name} report")
                label = _Label(follow=follow, job=None)
                self._pool.submit(label, function, follow.run_dir, needs=needs)

    def _wait(self) -> bool:
        """Waits for something to do; false if nothing goes on and nothing is left to be done."""
        if len(self._pool):
            deadline = time.monotonic() + self._config.poll_seconds
            while not self._stop.is_set and time.monotonic() < deadline:
                ended = self._pool.ended(_WAIT_SECONDS)
                for one in ended:
                    self._conclude(one)
                if ended:
                    break
            return True
        is_pending = any(follow.is_pending() for follow in self._follows)
        if is_pending or not self._is_over():
            longest = min(1.0, self._config.poll_seconds)
            self._stop.wait(longest if is_pending else self._config.poll_seconds)
        return is_pending

    def _conclude(self, ended: Ended) -> None:
        follow, job = ended.label.follow, ended.label.job
        if job is not None:
            follow.conclude(job, ended.result, ended.error)
            how = "done" if ended.error is None else f"failed: {ended.error}"
            if ended.result and ended.result.get("problems"):
                how = f"damaged: {'; '.join(ended.result['problems'])}"
            self._tell(f"{follow.run_dir.name}: {job.words} {how}")
            return
        self._judging.discard(follow)
        if ended.error is not None:
            follow.note("failed", key="report", reason=str(ended.error))
            self._tell(f"{follow.run_dir.name}: report failed: {ended.error}")
        elif follow.note_verdict(ended.result):
            self._tell(f"{follow.run_dir.name}: {ended.result['text']}")

    def _is_over(self) -> bool:
        """Whether no run will ever have anything more to do."""
        hours = self._config.idle_hours
        signs = [follow.last_sign() for follow in self._follows]
        if hours is not None and time.time() - max(signs, default=0.0) > 3600.0 * hours:
            return True
        return all(follow.is_finished and not follow.has_news for follow in self._follows)


def is_idle(follows: Sequence[Follow]) -> bool:
    """Whether nothing at all is to be done now: then no Ray need be started to find that out."""
    for follow in follows:
        follow.look()
    return not any(follow.is_pending() or follow.has_news for follow in follows)


def summed_up(follows: Sequence[Follow], *, once: bool, stopped_by: str | None = None) -> Summary:
    """How it ends, for the journals and for whoever started it."""
    why = f"{stopped_by} was received" if stopped_by else "everything is done"
    for follow in follows:
        follow.note("stop", reason=why, open_jobs=len(follow.open_jobs()))
    settled = [follow.settled for follow in follows]
    return Summary(
        stopped_by=stopped_by,
        num_open=sum(len(follow.open_jobs()) for follow in follows if follow.is_pending()),
        num_lost=sum(len(one.given_up) + len(one.damaged) for one in settled),
        goes_on=not once and not all(follow.is_finished for follow in follows),
    )


def check_resources(config: ConductConfig) -> None:
    """Refuses jobs that a Ray of our own could never run.

    Raises:
        ConfigError: A probe asks for more than `ray` has.
    """
    for probe in config.probes:
        for name in ("num_cpus", "num_gpus"):
            asked, there = getattr(probe, name), getattr(config.ray, name)
            if asked > there:
                raise ConfigError(
                    f"the probe {probe.task} asks for {name}: {asked:g}, and ray.{name} is "
                    f"{there:g}: it could never run",
                    remedy=f"Raise ray.{name}, or join a cluster with --address.",
                )


def _needs(resources: Resources, describe: str) -> TaskNeeds:
    return TaskNeeds(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, describe=describe)
