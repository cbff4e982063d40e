"""Which jobs a run's checkpoints ask for, and which of them are settled; nothing here acts."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from pipeline.checkpoint.layout import MANIFEST, list_commits, list_headless
from pipeline.conduct.settings import ConductConfig
from pipeline.track.journal import JournalEntry

Kind = Literal["verify", "mirror", "export", "probe", "record", "unmirror"]
"""In the order in which they are done."""
_ORDER: tuple[Kind, ...] = get_args(Kind)
_PLACES = {"mirror": "mirror", "unmirror": "mirror", "record": "MLflow"}
"""What a job writes that other jobs of the run write as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A checkpoint as it lies in the run's folder."""

    step: int
    path: Path
    mark: str
    """Of its manifest's content; a step that was trained again has another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Something that is done once with one checkpoint."""

    kind: Kind
    step: int
    mark: str
    name: str = ""
    """Export format or probe task."""
    version: str = ""
    """Of its settings: with other settings it is another job."""

    @property
    def key(self) -> str:
        """Names the job in the journal."""
        name = f":{self.name}" if self.name else ""
        version = f"~{self.version}" if self.version else ""
        return f"{self.kind}{name}{version}@{self.step}#{self.mark}"

    @property
    def words(self) -> str:
        """Names the job to people."""
        return f"step {self.step}: {self.kind} {self.name}".rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is asked for of every checkpoint of a run."""

    config: ConductConfig
    probe_versions: dict[str, str]
    """Task's name → digest of its settings."""
    probe_every: dict[str, int | None]
    is_tracked: bool
    """Whether the run goes to MLflow."""


@dataclass(kw_only=True, slots=True)
class Settled:
    """What the journal says has been done, given up, or cannot be done."""

    done: set[str] = field(default_factory=set)
    failures: Counter[str] = field(default_factory=Counter)
    given_up: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    """Mark of a checkpoint → what is wrong with it."""
    gone: set[str] = field(default_factory=set)
    steps: dict[str, int] = field(default_factory=dict)
    """Mark → step of every checkpoint that anything was done with."""

    def take(self, entry: JournalEntry) -> None:
        """Takes in a line of the journal."""
        mark = str(entry.details.get("mark", ""))
        if mark and entry.step is not None:
            self.steps[mark] = entry.step
        reason = str(entry.details.get("reason", ""))
        if entry.event == "done":
            self.done.add(entry.key)
        elif entry.event == "failed":
            self.failures[entry.key] += 1
        elif entry.event == "given_up":
            self.given_up[entry.key] = reason
        elif entry.event == "damaged":
            self.damaged[mark] = reason
        elif entry.event == "gone":
            self.gone.add(mark)
        elif entry.event == "retry":
            self.failures.clear()
            self.given_up.clear()
            self.damaged.clear()

    def is_settled(self, job: Job) -> bool:
        """Whether nothing more is to be done for a job."""
        return job.key in self.done or job.key in self.given_up


def settled_from(entries: Iterable[JournalEntry]) -> Settled:
    """What a journal says, from its first line on."""
    settled = Settled()
    for entry in entries:
        settled.take(entry)
    return settled


def seen_commits(run_dir: Path) -> list[Seen]:
    """All checkpoints of a run by rising step; those that lost their manifest, too."""
    found = []
    for commit in [*list_commits(run_dir), *list_headless(run_dir)]:
        try:
            mark = hashlib.sha256((commit.path / MANIFEST).read_bytes()).hexdigest()[:12]
        except FileNotFoundError:
            # Either it is being removed, or it lost its manifest: verifying will tell which.
            mark = "no-manifest"
        if commit.path.is_dir():
            found.append(Seen(step=commit.step, path=commit.path, mark=mark))
    return sorted(found, key=lambda seen: seen.step)


def jobs_of(seen: Seen, wanted: Wanted, *, is_last: bool) -> list[Job]:
    """Everything that is ever done with one checkpoint, in order.

    Args:
        seen: The checkpoint.
        wanted: What is asked for.
        is_last: Whether it is the newest of a run that has finished: it gets everything.
    """
    step, config = seen.step, wanted.config
    jobs = [Job(kind="verify", step=step, mark=seen.mark)]
    if config.mirror is not None:
        version = digest(config.mirror.url)
        jobs.append(Job(kind="mirror", step=step, mark=seen.mark, version=version))
    export = config.export
    if export is not None and _is_due(export.every_steps, step, is_last=is_last):
        version = digest(f"{export.weights} {export.folder}")
        jobs += [
            Job(kind="export", step=step, mark=seen.mark, name=name, version=version)
            for name in export.formats
        ]
    due = [
        (name, version)
        for name, version in wanted.probe_versions.items()
        if _is_due(wanted.probe_every[name], step, is_last=is_last)
    ]
    jobs += [
        Job(kind="probe", step=step, mark=seen.mark, name=name, version=version)
        for name, version in due
    ]
    return jobs


def open_jobs(
    commits: Sequence[Seen], wanted: Wanted, settled: Settled, *, is_finished: bool
) -> list[Job]:
    """What is still to be done with the checkpoints that are there, whether or not it can be yet.

    Args:
        commits: By rising step.
        wanted: What is asked for.
        settled: What has been done.
        is_finished: Whether the run has come to its end.
    """
    last = commits[-1].step if commits else None
    of_commits = [
        job
        for seen in commits
        if seen.mark not in settled.damaged
        for job in jobs_of(seen, wanted, is_last=is_finished and seen.step == last)
        if not _is_in_vain(job, settled)
    ]
    others = [*_unrecorded(wanted, settled), *_mirrored_in_vain(commits, wanted, settled)]
    return [job for job in [*of_commits, *others] if not settled.is_settled(job)]


def can_begin(job: Job, settled: Settled) -> bool:
    """Whether what a job needs has been done: nothing is read before it is verified."""
    if job.kind in ("verify", "record", "unmirror"):
        return True
    return Job(kind="verify", step=job.step, mark=job.mark).key in settled.done


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """Safety first, then what makes others wait least: by kind, older checkpoints before newer."""
    return sorted(jobs, key=lambda job: (_ORDER.index(job.kind), job.step, job.name))


def one_at_a_time(jobs: Iterable[Job], in_flight: Collection[str]) -> list[Job]:
    """Leaves the first of those jobs that write one place, and none while such a one goes on.

    Side by side, the mirroring of an older checkpoint would set a newer one aside that came first.

    Args:
        jobs: Of one run, most urgent first.
        in_flight: Keys of those that have begun.
    """
    taken = {_PLACES.get(key.split("@")[0].split("~")[0]) for key in in_flight}
    left = []
    for job in jobs:
        place = _PLACES.get(job.kind)
        if place is None or place not in taken:
            left.append(job)
            taken.add(place)
    return left


def digest(text: str) -> str:
    """Short digest of settings."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _is_due(every: int | None, step: int, *, is_last: bool) -> bool:
    return every is None or step % every == 0 or is_last


def _is_in_vain(job: Job, settled: Settled) -> bool:
    """Whether the verifying that the job needs was given up."""
    verify = Job(kind="verify", step=job.step, mark=job.mark)
    return job.kind != "verify" and verify.key in settled.given_up


def _unrecorded(wanted: Wanted, settled: Settled) -> Iterable[Job]:
    """What MLflow is to be told of; the scores outlive their checkpoints."""
    if not (wanted.config.mlflow and wanted.is_tracked):
        return
    for mark, step in settled.steps.items():
        for name, version in wanted.probe_versions.items():
            told = {"step": step, "mark": mark, "name": name, "version": version}
            if Job(kind="probe", **told).key in settled.done:
                yield Job(kind="record", **told)


def _mirrored_in_vain(commits: Sequence[Seen], wanted: Wanted, settled: Settled) -> Iterable[Job]:
    """Removals from the mirror of what was removed here, while a newer one stands in both."""
    mirror = wanted.config.mirror
    if mirror is None or mirror.keep == "all":
        return
    version = digest(mirror.url)
    here = {seen.mark: seen.step for seen in commits}
    both = [step for mark, step in here.items() if _mirrored(mark, step, version) in settled.done]
    for mark in sorted(settled.gone):
        step = settled.steps.get(mark, 0)
        if _mirrored(mark, step, version) in settled.done and step < max(both, default=-1):
            yield Job(kind="unmirror", step=step, mark=mark, version=version)


def _mirrored(mark: str, step: int, version: str) -> str:
    return Job(kind="mirror", step=step, mark=mark, version=version).key
