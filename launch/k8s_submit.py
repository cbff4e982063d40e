"""Hands a job's objects to Kubernetes, and writes down what was handed over."""

import math
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.job import JobSpec
from launch.k8s import main_object
from launch.k8s_text import Object
from pipeline.errors import StorageError, UsageError
from pipeline.files import write_atomically
from pipeline.track.jobs import JobRecord, record_job
from pipeline.track.metrics import read_events

_KUBECTL_SECONDS = 120.0
_CLIENT_LOG = re.compile(r"[EWI]\d{4} ")
# One step, and what ending takes: as the site's own figure is meant.
_BESIDE_SAVE_SECONDS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """Objects in the cluster's hands."""

    record: JobRecord

    @property
    def words(self) -> str:
        """What the person who submitted it wants to know."""
        record = self.record
        return (
            f"job      {record.id}, {record.kind} of {record.name}\n"
            f"log      {record.log}\n"
            f"objects  {record.script}\n"
            f"watch    {record.watch}\n"
            f"stop     {record.stop}\n"
            f"pause    {pause_command(record)}"
        )


def with_measured_grace(job: JobSpec) -> JobSpec:
    """The job with at least as much grace as the longest save that its run has told of."""
    if job.run_dir is None or not (job.run_dir / "events.jsonl").is_file():
        return job
    told = (event.details.get("behind_seconds") for event in read_events(job.run_dir))
    longest = max((float(said) for said in told if isinstance(said, int | float)), default=0.0)
    needed = math.ceil(longest) + _BESIDE_SAVE_SECONDS if longest else 0
    return replace(job, grace_seconds=max(job.grace_seconds, needed))


def submit(job: JobSpec, made: Sequence[Object], text: str) -> Submitted:
    """Writes the objects into the run's folder and applies them.

    Args:
        job: The job.
        made: Its objects.
        text: The same as YAML.

    Raises:
        UsageError: There is no kubectl here, or the cluster refused an object.
        StorageError: The run's folder cannot be written to.
    """
    _must_have_kubectl()
    _must_be_new(main_object(list(made)))
    folder = job.run_dir or job.work_dir
    path = folder / "jobs" / f"{job.name}-{job.kind}.k8s.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}") from error
    _kubectl(["apply", "--filename", str(path)])
    record = record_of(job, list(made), path)
    record_job(folder, record)
    return Submitted(record=record)


def record_of(job: JobSpec, made: list[Object], path: Path) -> JobRecord:
    """What is written down of a submission."""
    main = main_object(made)
    name, kind = main["metadata"]["name"], main["kind"].lower()
    kubectl = f"kubectl --namespace {main['metadata']['namespace']}"
    return JobRecord(
        scheduler="k8s",
        id=f"{kind}/{name}",
        name=job.name,
        kind=job.kind,
        submitted=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        log=f"{kubectl} logs --selector app.kubernetes.io/instance={name} --all-containers "
        "--prefix --tail -1",
        watch=f"{kubectl} get {kind}/{name},pods --selector app.kubernetes.io/instance={name}",
        stop=f"{kubectl} delete {kind}/{name}",
        script=str(path),
    )


def pause_command(record: JobRecord) -> str:
    """Ends a job's pods in good order and keeps the job, to be let go on later."""
    patch = '{"spec":{"suspend":true}}'
    return record.stop.replace(" delete ", " patch ") + f" --type merge --patch '{patch}'"


def try_out(text: str) -> str:
    """What the cluster, its admission webhooks included, would make of the objects.

    Raises:
        UsageError: It would refuse one.
    """
    _must_have_kubectl()
    return _kubectl(["apply", "--dry-run=server", "--filename", "-"], text).strip()


def _must_have_kubectl() -> None:
    if shutil.which("kubectl") is None:
        raise UsageError(
            "kubectl is not on this machine, so nothing can be submitted from here",
            remedy="Install it, or add --print and apply the file elsewhere.",
        )


def _must_be_new(main: Object) -> None:
    """Applied to an ended job of the same name, the same objects would change and start nothing."""
    where = ["--namespace", main["metadata"]["namespace"]]
    name = f"{main['kind'].lower()}/{main['metadata']['name']}"
    found = _kubectl(["get", name, *where, "--ignore-not-found", "--output", "name"])
    if found.strip():
        raise UsageError(
            f"{name} is already there, running, paused or ended",
            remedy=f"`kubectl {' '.join(where)} delete {name}` first; the run's checkpoints stay, "
            "and the new job continues from them.",
        )


def _kubectl(words: Sequence[str], text: str | None = None) -> str:
    command = ["kubectl", *words]
    try:
        answer = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            timeout=_KUBECTL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f"kubectl gave no answer within {_KUBECTL_SECONDS:.0f} s",
            remedy="`kubectl cluster-info` shows whether the cluster can be reached.",
        ) from error
    if answer.returncode:
        lines = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
        # The client's own log lines, such as E1123 02:32:57, say the same five times.
        told = "; ".join(line for line in lines if not _CLIENT_LOG.match(line)) or "no reason given"
        if "refused" in told or "no such host" in told or "i/o timeout" in told:
            raise UsageError(
                f"the cluster cannot be reached: {told}",
                remedy="`kubectl cluster-info` and `kubectl config current-context` show which one "
                "is asked; --print needs none.",
            )
        raise UsageError(
            f"Kubernetes refused the job: {told}",
            remedy="k8s/README.md names the usual reasons; --print shows the objects.",
        )
    return answer.stdout
