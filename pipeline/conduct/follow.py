"""One run as the conductor follows it: what is there, what is to do, what was done."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.conduct.jobs import (
    Job,
    Seen,
    Settled,
    Wanted,
    can_begin,
    in_order,
    one_at_a_time,
    open_jobs,
    seen_commits,
    settled_from,
)
from pipeline.conduct.prepare import PreparedProbe, drop_export, export_folder
from pipeline.conduct.retention import (
    CONDUCT_FOLDER,
    WishList,
    is_owned,
    remove_unwanted,
    wishes_of,
)
from pipeline.conduct.settings import ConductConfig
from pipeline.config.load import load_config
from pipeline.errors import ExitCode, JepaError, StorageError
from pipeline.report.facts import check_is_run, how_ended
from pipeline.run import RunConfig
from pipeline.track.folder import (
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    PROBE_FOLDER,
    ProbeScore,
    read_probes,
    read_run_info,
)
from pipeline.track.journal import JOURNAL_FILE, JournalEntry, is_untold, read_journal
from pipeline.track.jsonl import JsonLinesWriter
from pipeline.track.lease import Lease, OwnerError, acquire
from pipeline.track.metrics import RunStatus, read_events
from pipeline.track.nested import is_recorded
from pipeline.track.probe_trend import best_steps

# Trying again cannot help: the settings are wrong, or a person has to look.
_HOPELESS = (ExitCode.CONFIG, ExitCode.USAGE)


class Follow:
    """A run, its journal, and the right to conduct it.

    Args:
        run_dir: Folder of the run.
        config: What to do.
        probes: Tasks by name.

    Raises:
        UsageError: It is no run's folder, or another conductor follows it.
        ConfigError: The run's configuration cannot be read.
        StorageError: The folder cannot be written to.
    """

    def __init__(
        self, run_dir: Path, config: ConductConfig, probes: Mapping[str, PreparedProbe]
    ) -> None:
        check_is_run(run_dir)
        self.run_dir, self.config, self.probes = run_dir, config, probes
        self.run_config = load_config(run_dir / CONFIG_FILE, RunConfig).config
        self.wanted = Wanted(
            config=config,
            probe_versions={name: probe.version for name, probe in probes.items()},
            probe_every={name: probe.config.every_steps for name, probe in probes.items()},
            is_tracked=self.run_config.track.mlflow.enabled,
        )
        self._lease = _own(run_dir)
        self._journal = JsonLinesWriter(run_dir / JOURNAL_FILE)
        entries = read_journal(run_dir)
        self.settled: Settled = settled_from(entries)
        self.verdict = next((e.details for e in reversed(entries) if e.event == "verdict"), None)
        self.commits: list[Seen] = []
        self.is_finished = False
        self.has_news = self.verdict is None or is_untold(entries)
        """Whether anything was found out that the report does not tell yet."""
        self._wishes = WishList(run_dir)
        self._in_flight: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._num_noted, self._num_judged = len(entries), 0
        self._probe_stamps: frozenset[tuple[str, int]] = frozenset()
        self._probe_scores: tuple[ProbeScore, ...] = ()

    @property
    def status(self) -> RunStatus:
        """How MLflow is told that the run stands, when nobody owns it any more."""
        how = how_ended(read_events(self.run_dir), self.run_dir)
        return how if how in ("finished", "stopped") else "failed"

    @property
    def run_id(self) -> str | None:
        """The run's own identity, that of its checkpoints."""
        return read_run_info(self.run_dir).get("run_id")

    def note(self, event: str, *, step: int | None = None, key: str = "", **details: Any) -> None:
        """Writes a line of the journal, and takes it in."""
        now = time.time()
        entry = JournalEntry(time=now, event=event, step=step, key=key, details=details)
        told = {"time": round(now, 3), "event": event, "step": step, "key": key, **details}
        self._journal.write(
            {name: value for name, value in told.items() if value not in (None, "")}
        )
        self.settled.take(entry)
        self._num_noted += 1

    def look(self) -> list[Job]:
        """Looks at the run's folder; the jobs that can begin now, most urgent first."""
        self._lease.check()
        self.is_finished = how_ended(read_events(self.run_dir), self.run_dir) == "finished"
        self.commits = seen_commits(self.run_dir)
        self._note_gone()
        for job in self.open_jobs():
            if job.kind == "record" and job.key not in self._in_flight:
                self._note_recorded(job)
        jobs = [job for job in self.open_jobs() if self._may_begin(job)]
        self._retain()
        return one_at_a_time(in_order(jobs), self._in_flight)

    def open_jobs(self) -> list[Job]:
        """All that is still to be done with what is there."""
        return open_jobs(self.commits, self.wanted, self.settled, is_finished=self.is_finished)

    def begin(self, job: Job) -> Seen | None:
        """Notes that a job begins, and why; gives its checkpoint."""
        self._in_flight[job.key] = time.monotonic()
        attempt = self.settled.failures[job.key] + 1
        why = _why(job, self.config) + (f"; attempt {attempt}" if attempt > 1 else "")
        self.note("begin", step=job.step, key=job.key, mark=job.mark, job=job.words, why=why)
        return next((seen for seen in self.commits if seen.mark == job.mark), None)

    def conclude(self, job: Job, result: dict[str, Any] | None, error: JepaError | None) -> None:
        """Notes how a job ended."""
        began = self._in_flight.pop(job.key, time.monotonic())
        if error is not None:
            self._note_failure(job, error)
            return
        told = {"seconds": round(time.monotonic() - began, 2), **(result or {})}
        problems = told.pop("problems", [])
        self.has_news = True
        if problems and all(seen.mark != job.mark for seen in seen_commits(self.run_dir)):
            return  # It was removed meanwhile: the next look notes that.
        if problems:
            reason = "; ".join(problems)
            self.note("damaged", step=job.step, key=job.key, mark=job.mark, reason=reason)
            return
        self.note("done", step=job.step, key=job.key, mark=job.mark, job=job.words, **told)

    def begin_judging(self) -> None:
        """What is found out from now on is for the next verdict."""
        self.has_news = False
        self._num_judged = self._num_noted

    def note_verdict(self, judged: Mapping[str, Any]) -> bool:
        """Notes that the run has been judged, and the verdict if it is news; true if it is."""
        self.note("judged", lines=self._num_judged)
        keys = ("state", "keep")
        before = self.verdict or {}
        if self.verdict is not None and all(before.get(k) == judged.get(k) for k in keys):
            return False
        self.verdict = judged
        self.note("verdict", **judged)
        return True

    def is_pending(self) -> bool:
        """Whether anything is left that this conductor has to do, now or after a pause."""
        jobs = self.open_jobs()
        if all(job.kind == "record" for job in jobs):
            # Those of a run that goes on are sent by its own uploading process.
            return bool(jobs) and not is_owned(self.run_dir)
        return True

    def last_sign(self) -> float:
        """When the run last wrote anything, unix seconds."""
        paths = [self.run_dir / name for name in (METRICS_FILE, EVENTS_FILE, CONFIG_FILE)]
        return max(path.stat().st_mtime for path in paths if path.exists())

    def close(self) -> None:
        """Gives the run back."""
        self._journal.close()
        self._lease.release()

    def _may_begin(self, job: Job) -> bool:
        if job.key in self._in_flight or not can_begin(job, self.settled):
            return False
        if job.kind == "record" and is_owned(self.run_dir):
            return False  # the run's own uploading process does it within seconds
        return time.monotonic() >= self._not_before.get(job.key, 0.0)

    def _note_recorded(self, job: Job) -> None:
        if can_begin(job, self.settled) and is_recorded(self.run_dir, job.name, job.step):
            why = "the run's own uploading process, or an earlier job, has sent it"
            self.note("done", step=job.step, key=job.key, mark=job.mark, job=job.words, why=why)

    def _note_failure(self, job: Job, error: JepaError) -> None:
        reason = str(error)
        self.note("failed", step=job.step, key=job.key, mark=job.mark, job=job.words, reason=reason)
        failures = self.settled.failures[job.key]
        if failures >= self.config.max_failures or error.exit_code in _HOPELESS:
            self.has_news = True
            told = f"failed {failures} times; the last time: {reason}" if failures > 1 else reason
            self.note(
                "given_up", step=job.step, key=job.key, mark=job.mark, job=job.words, reason=told
            )
            return
        wait = self.config.retry_seconds * 2 ** (failures - 1)
        self._not_before[job.key] = time.monotonic() + wait

    def _note_gone(self) -> None:
        """Notes checkpoints that were worked on and are there no more; drops their exports."""
        there = {seen.mark for seen in self.commits}
        missing = set(self.settled.steps) - there - self.settled.gone
        if not self.commits:
            return  # A folder that is not mounted looks the same as one that was emptied.
        for mark in sorted(missing, key=lambda mark: self.settled.steps[mark]):
            step = self.settled.steps[mark]
            self.note(
                "gone", step=step, mark=mark, reason="it is no longer among the run's checkpoints"
            )
            if all(seen.step != step for seen in self.commits):
                self._drop_exports(step)

    def _drop_exports(self, step: int) -> None:
        export = self.config.export
        if export is None or export.keep == "all":
            return
        for name in export.formats:
            if drop_export(export_folder(self.run_dir, export, step, name)):
                self.note("export_removed", step=step, reason="its checkpoint is gone", format=name)

    def _retain(self) -> None:
        """Tells what has to stay, and removes what nobody wants where nobody trains."""
        retention = self.config.retention
        steps = [seen.step for seen in self.commits if seen.mark not in self.settled.damaged]
        waiting: dict[int, str] = {}
        for job in self.open_jobs():
            if job.kind not in ("record", "unmirror"):
                waiting.setdefault(job.step, job.words)
        best = best_steps(self._scores(), retention.best_by, steps)
        self._wishes.tell(wishes_of(steps, waiting, best, retention))
        if not retention.enabled:
            return
        whole = {
            seen.step
            for seen in self.commits
            if Job(kind="verify", step=seen.step, mark=seen.mark).key in self.settled.done
        }
        removed = remove_unwanted(self.run_dir, self.run_config.checkpoint, whole)
        for step, why in removed:
            self.note("removed", step=step, reason=why)

    def _scores(self) -> tuple[ProbeScore, ...]:
        """All probe scores; read again only when a file is new."""
        files = (self.run_dir / PROBE_FOLDER).glob("*.json")
        stamps = frozenset((path.name, path.stat().st_mtime_ns) for path in files)
        if stamps != self._probe_stamps:
            self._probe_scores, self._probe_stamps = read_probes(self.run_dir), stamps
        return self._probe_scores


def _own(run_dir: Path) -> Lease:
    folder = run_dir / CONDUCT_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        lease = acquire(folder)
    except OwnerError as error:
        raise OwnerError(
            str(error).replace(str(folder), f"{run_dir}: its conductor"),
            remedy="One conductor follows a run; stop that process, or let it go on.",
        ) from error
    except OSError as error:
        raise StorageError(f"Cannot write {folder}: {error.strerror or error}") from error
    lease.keep_alive()
    return lease


def _why(job: Job, config: ConductConfig) -> str:
    if job.kind == "verify":
        return "a checkpoint that was not there before"
    every: int | None = None
    if job.kind == "export" and config.export is not None:
        every = config.export.every_steps
    if job.kind == "record":
        return "new scores, and nobody trains who would send them"
    if job.kind == "unmirror":
        return "it was removed from the run's folder"
    return "it is whole" if every is None else f"it is whole, and a multiple of {every} or the last"
