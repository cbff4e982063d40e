"""Which jobs of which scheduler a run has had: `jobs.jsonl`, and what the scheduler says of them.

Written when a job is submitted, before the run itself has said a word; so `jepa status` can tell
from a login node that a run is still queued.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.track.jobs_k8s import ask_k8s
from pipeline.track.jsonl import JsonLinesWriter, read_json_lines

JOBS_FILE = "jobs.jsonl"
# A controller that does not answer must not keep anybody from seeing how the run stands.
_ASK_SECONDS = 10.0
_MOST_SHOWN = 3
_SLURM_WORDS = {
    "PENDING": "queued", "REQUEUED": "queued", "REQUEUE_HOLD": "held", "CONFIGURING": "starting",
    "RUNNING": "running", "COMPLETING": "ending", "STOPPED": "paused", "SUSPENDED": "paused",
    "PREEMPTED": "preempted", "COMPLETED": "finished", "CANCELLED": "cancelled",
    "TIMEOUT": "out of time", "NODE_FAIL": "lost a node", "OUT_OF_MEMORY": "out of memory",
    "FAILED": "failed", "BOOT_FAIL": "failed", "DEADLINE": "failed",
}  # fmt: skip
ALIVE = ("queued", "held", "starting", "running", "ending", "paused")
"""States after which a job may still do something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One submission."""

    scheduler: str
    """`slurm`, `k8s`, `ray` or `local`."""
    id: str
    """The scheduler's name for it."""
    name: str
    kind: str
    submitted: str
    """UTC."""
    log: str
    watch: str
    """Command that shows how it goes."""
    stop: str
    """Command that ends it."""
    script: str = ""
    """What was submitted."""
    after: str = ""
    """What it waits for, in the scheduler's words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """What the scheduler says of a job."""

    state: str
    """queued, running, preempted, finished … ; `unknown` if the scheduler is not at hand."""
    detail: str = ""
    """Why it waits, where it runs, or with what code it ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PresentJob:
    """A submission and how it stands."""

    record: JobRecord
    state: JobState

    @property
    def words(self) -> str:
        """One line: state, why, what it is, and the command that shows or ends it."""
        record, state = self.record, self.state
        detail = f" ({state.detail})" if state.detail else ""
        ends = f"; `{record.stop}` ends it" if state.state in ALIVE else ""
        return (
            f"{state.state}{detail}: {record.scheduler} {record.id}, {record.kind} of "
            f"{record.name}, submitted {record.submitted}; log {record.log}{ends}"
        )

    def to_dict(self) -> dict[str, str]:
        """For `--json`."""
        return {**asdict(self.record), "state": self.state.state, "detail": self.state.detail}


def present_jobs(run_dir: Path) -> tuple[PresentJob, ...]:
    """The newest submissions of a run and what their schedulers say of them now."""
    return tuple(
        PresentJob(record=record, state=ask(record)) for record in read_jobs(run_dir)[-_MOST_SHOWN:]
    )


def record_job(run_dir: Path, record: JobRecord) -> None:
    """Appends a submission to the run's record.

    Raises:
        StorageError: The folder cannot be written to.
    """
    writer = JsonLinesWriter(run_dir / JOBS_FILE)
    writer.write(asdict(record))
    writer.close()


def read_jobs(run_dir: Path) -> tuple[JobRecord, ...]:
    """All submissions of a run, oldest first."""
    known = {field.name for field in fields(JobRecord)}
    needed = known - {"script", "after"}
    records = read_json_lines(run_dir / JOBS_FILE).records
    return tuple(
        JobRecord(**{key: str(value) for key, value in record.items() if key in known})
        for record in records
        if needed <= record.keys()
    )


def ask(record: JobRecord) -> JobState:
    """How a job stands, by its scheduler's present word."""
    if record.scheduler == "slurm":
        return _ask_slurm(record.id)
    if record.scheduler == "k8s":
        state, detail = ask_k8s(record.stop, _said)
        return JobState(state=state, detail=detail)
    return JobState(state="unknown", detail=f"`{record.watch}` tells")


def _ask_slurm(job_id: str) -> JobState:
    if shutil.which("squeue") is None:
        return JobState(state="unknown", detail="Slurm's commands are not on this machine")
    # Fields that hold no blanks; of an array one line for each job.
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    lines = _said(command)
    if lines:
        return _of_array([_slurm_state(line) for line in lines])
    # The controller forgets a job minutes after its end; the data base does not, if there is one.
    lines = _said(["sacct", "-nPX", "--jobs", job_id, "--format=State,ExitCode,NodeList"])
    if not lines:
        return JobState(state="unknown", detail="Slurm does not answer, or no longer knows it")
    state, code, nodes = (*lines[-1].split("|"), "", "")[:3]
    # CANCELLED by 1000: who did it is not asked here.
    return _worded(state.partition(" ")[0], code, nodes, "")


def _slurm_state(line: str) -> JobState:
    found = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return _worded(
        found.get("JobState", ""),
        found.get("ExitCode", ""),
        found.get("NodeList", ""),
        found.get("Reason", ""),
    )


def _worded(state: str, code: str, nodes: str, reason: str) -> JobState:
    word = _SLURM_WORDS.get(state, state.lower() or "unknown")
    if word in ("queued", "held"):
        return JobState(state=word, detail=f"waits for: {reason}")
    if word in ALIVE:
        return JobState(state=word, detail=f"on {nodes}")
    return JobState(state=word, detail=f"exit code {code.partition(':')[0]}" if code else "")


def _of_array(states: Sequence[JobState]) -> JobState:
    if len(states) == 1:
        return states[0]
    counts = {one.state: sum(other.state == one.state for other in states) for one in states}
    words = ", ".join(f"{count} {state}" for state, count in counts.items())
    alive = next((one.state for one in states if one.state in ALIVE), states[-1].state)
    return JobState(state=alive, detail=words)


def _said(command: Sequence[str]) -> list[str]:
    """Lines that a command of the scheduler printed; none if it failed or did not answer."""
    if shutil.which(command[0]) is None:
        return []
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in answer.stdout.splitlines() if line.strip()]
