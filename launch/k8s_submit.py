"""Hands a job's objects to Kubernetes, and writes down what was handed over."""

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job import JobSpec
from launch.k8s import is_queued, main_objects
from launch.k8s_text import Object
from pipeline.errors import StorageError, UsageError
from pipeline.files import write_atomically
from pipeline.track.jobs import JobRecord, record_job

_KUBECTL_SECONDS = 120.0
_CLIENT_LOG = re.compile(r"[EWI]\d{4} ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """Objects in the cluster's hands."""

    record: JobRecord
    pause: str
    """Command that ends its pods and keeps the job; empty for an array."""

    @property
    def words(self) -> str:
        """What the person who submitted it wants to know."""
        record = self.record
        return (
            f"job      {record.id}, {record.kind} of {record.name}\n"
            f"log      {record.log}\n"
            f"objects  {record.script}\n"
            f"watch    {record.watch}\n"
            f"stop     {record.stop}" + (f"\npause    {self.pause}" if self.pause else "")
        )


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
    _must_be_new(main_objects(made))
    folder = job.run_dir or job.work_dir
    path = folder / "jobs" / f"{job.name}-{job.kind}.k8s.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}") from error
    _kubectl(["apply", "--filename", str(path)])
    record = record_of(job, made, path)
    record_job(folder, record)
    return Submitted(record=record, pause=pause_command(made))


def record_of(job: JobSpec, made: Sequence[Object], path: Path) -> JobRecord:
    """What is written down of a submission."""
    main = main_objects(made)
    names, kind = [one["metadata"]["name"] for one in main], main[0]["kind"].lower()
    kubectl = _kubectl_in(main[0])
    mine = f"app.kubernetes.io/instance={names[0]}"
    if len(names) > 1:
        mine = f"'app.kubernetes.io/instance in ({','.join(names)})'"
    return JobRecord(
        scheduler="k8s",
        id=f"{kind}/{names[0]}" + (f" to {names[-1]}" if len(names) > 1 else ""),
        name=job.name,
        kind=job.kind,
        submitted=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        log=f"{kubectl} logs --selector {mine} --all-containers --prefix --tail -1",
        watch=f"{kubectl} get {kind},pods --selector {mine}",
        stop=f"{kubectl} delete {' '.join(f'{kind}/{name}' for name in names)}",
        script=str(path),
    )


def pause_command(made: Sequence[Object]) -> str:
    """Ends a job's pods in good order and keeps the job, to be let go on later.

    A job that Kueue has admitted would be let go on at once: there its Workload is paused.
    """
    main, *more = main_objects(made)
    if more:
        return ""
    kubectl, name = _kubectl_in(main), f"{main['kind'].lower()}/{main['metadata']['name']}"
    if not is_queued(main):
        patch = '{"spec":{"suspend":true}}'
        return f"{kubectl} patch {name} --type merge --patch '{patch}'"
    patch, uid = (
        '{"spec":{"active":false}}',
        f"{kubectl} get {name} --output jsonpath={{.metadata.uid}}",
    )
    found = f"{kubectl} get workloads --selector kueue.x-k8s.io/job-uid=$({uid}) --output name"
    return f"{kubectl} patch $({found}) --type merge --patch '{patch}'"


def _kubectl_in(one: Object) -> str:
    return f"kubectl --namespace {one['metadata']['namespace']}"


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


def _must_be_new(main: Sequence[Object]) -> None:
    """Applied to an ended job of the same name, the same objects would change and start nothing."""
    where = ["--namespace", main[0]["metadata"]["namespace"]]
    names = [f"{one['kind'].lower()}/{one['metadata']['name']}" for one in main]
    found = _kubectl(["get", *names, *where, "--ignore-not-found", "--output", "name"]).split()
    if found:
        raise UsageError(
            f"{', '.join(found)} is already there, running, paused or ended",
            remedy=f"`kubectl {' '.join([*where, 'delete', *found])}` first; the run's checkpoints "
            "stay, and the new job continues from them.",
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
