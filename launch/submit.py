"""Hands a rendered job to Slurm, and writes down what was handed over."""

import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job import JobSpec
from launch.slurm import log_path
from pipeline.errors import StorageError, UsageError
from pipeline.files import write_atomically
from pipeline.track.jobs import ALIVE, JobRecord, ask, read_jobs, record_job

# A controller under load answers late; one that is down never does.
_SBATCH_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """A job in the scheduler's hands."""

    record: JobRecord
    run_dir: Path

    @property
    def words(self) -> str:
        """What the person who submitted it wants to know."""
        record = self.record
        return (
            f"job      {record.id}, {record.kind} of {record.name}\n"
            f"log      {record.log}\n"
            f"script   {record.script}\n"
            f"watch    {record.watch}\n"
            f"stop     {record.stop}"
        )


def submit(job: JobSpec, text: str, *, after: Sequence[str] = ()) -> Submitted:
    """Writes the script and the frozen configuration into the run's folder and calls sbatch.

    Args:
        job: The job.
        text: Its batch script.
        after: What it waits for, already in `text`; for the record.

    Raises:
        UsageError: There is no Slurm here, it refused the job, or the run has one already.
        StorageError: The run's folder cannot be written to.
    """
    _must_have_slurm()
    if job.kind == "train" and not after:
        _must_be_alone(job)
    script = _write(job, text)
    # %x, %j and so on stand in the directive; the numbers are known only now.
    job_id = _sbatch(["--parsable", str(script)]).strip().split(";")[0]
    log = log_path(job).replace("%x", job.name).replace("%j", job_id).replace("%A", job_id)
    log = log.replace("%a", "*")
    run_dir = job.run_dir or job.work_dir
    record = JobRecord(
        scheduler="slurm",
        id=job_id,
        name=job.name,
        kind=job.kind,
        submitted=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        log=log,
        watch=f"jepa status {run_dir}" if job.kind == "train" else f"tail -F {log}",
        stop=f"scancel {job_id}",
        script=str(script),
        after=",".join(after),
    )
    record_job(run_dir, record)
    return Submitted(record=record, run_dir=run_dir)


def try_out(text: str) -> str:
    """What Slurm would do with the job, without queueing it.

    Raises:
        UsageError: It would refuse the job.
    """
    _must_have_slurm()
    return _sbatch(["--test-only"], text).strip()


def _must_have_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise UsageError(
            "sbatch is not on this machine, so no job can be submitted from here",
            remedy="Run this on a login node, or add --print and submit the file there.",
        )


def by_hand(job: JobSpec, words: Sequence[str]) -> str:
    """What a person does before handing the printed script to sbatch.

    Slurm makes no folder for a log, and the job reads a configuration that nobody has frozen yet.
    """
    folder = (job.run_dir or job.work_dir) / "jobs"
    steps = [shlex.join(["mkdir", "-p", str(folder)])]
    if job.config_path is not None:
        shown = shlex.join(["jepa", "config", "show", *words])
        steps.append(f"{shown} > {shlex.quote(str(job.config_path))}")
    return f"To submit the printed file by hand, first: {' && '.join(steps)}"


def _must_be_alone(job: JobSpec) -> None:
    """Of two jobs of one run the later one would wait for nothing but the other's lease."""
    records = read_jobs(job.run_dir) if job.run_dir is not None else ()
    for record in [one for one in records if (one.scheduler, one.kind) == ("slurm", "train")][-3:]:
        state = ask(record).state
        if state in ALIVE and state != "ending":
            raise UsageError(
                f"{job.run_dir} has a job already: {record.id} is {state}",
                remedy=f"`{record.stop}` ends it; --after {record.id} or --after singleton queues "
                "another one behind it.",
            )


def _write(job: JobSpec, text: str) -> Path:
    """The script beside the configuration that it names; a former one of this name is replaced."""
    folder = (job.run_dir or job.work_dir) / "jobs"
    script = folder / f"{job.name}-{job.kind}.sbatch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if job.config_path is not None and job.config_text is not None:
            write_atomically(job.config_path, job.config_text)
        write_atomically(script, text)
    except OSError as error:
        raise StorageError(f"Cannot write {folder}: {error.strerror or error}") from error
    return script


def _sbatch(words: Sequence[str], text: str | None = None) -> str:
    try:
        answer = subprocess.run(
            ["sbatch", *words],  # noqa: S607 - wherever the cluster has it
            input=text,
            capture_output=True,
            text=True,
            timeout=_SBATCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f"sbatch gave no answer within {_SBATCH_SECONDS:.0f} s",
            remedy="See with `squeue --me` whether the job was taken; `scontrol ping` tells of the "
            "controller.",
        ) from error
    if answer.returncode:
        raise UsageError(
            f"Slurm refused the job: {answer.stderr.strip() or answer.stdout.strip()}",
            remedy="Correct the site file, or a flag; `sinfo` shows partitions and nodes. If it "
            "does not answer either, this machine is not set up for Slurm: use a login node.",
        )
    # --test-only speaks on the error stream.
    return answer.stdout or answer.stderr
