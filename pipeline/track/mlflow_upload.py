"""What of a run goes to MLflow, and how far it has come; the only importer of mlflow.

Runs in the uploading process, which has no need of torch and does not load it.
"""

import hashlib
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.environment_variables as settings
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from ruamel.yaml import YAML
from sqlalchemy.exc import SQLAlchemyError

from pipeline.track.folder import (
    CONFIG_FILE,
    METRICS_FILE,
    MLFLOW_FILE,
    SYSTEM_FILE,
    read_json_object,
    read_run_info,
    write_json,
)
from pipeline.track.jsonl import read_json_lines
from pipeline.track.mlflow_job import UploadJob
from pipeline.track.mlflow_nested import ProbeSender
from pipeline.track.mlflow_points import mlflow_name, points

_RUN_TAG = "jepa.run"
_STATUS_TAG = "jepa.status"
# What MLflow takes in one request, and in one parameter on servers of all ages.
_METRICS_PER_BATCH, _PARAMS_PER_BATCH, _PARAM_CHARACTERS = 900, 90, 500
# Saves how far it came after each so much of a file.
_READ_BYTES = 2**20
# Constant within a stage, or not numbers.
_NOT_PLOTTED = ("time", "step", "stage_name", "terms", "health")
_NOT_PLOTTED += ("clips", "tokens", "flops", "hardware_flops")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 120.0
_MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED"}
# A refused or hanging server, a locked or read-only database, a vanished artefact folder.
_OUTAGES = (MlflowException, SQLAlchemyError, OSError)


@dataclass(kw_only=True, slots=True)
class UploadState:
    """How far a run's records have come, kept in its mlflow.json."""

    tracking_uri: str
    run_id: str | None = None
    uploaded: dict[str, int] = field(default_factory=dict)
    """Byte of each file from which on MLflow has not got it."""
    probes: list[str] = field(default_factory=list)
    nested: dict[str, dict[str, str]] = field(default_factory=dict)
    """Nested runs by what they hold: `run_id` and `digest`."""
    config_digest: str = ""
    state: str = "starting"
    error: str = ""


class Uploader:
    """Brings MLflow up to date with a run's files, whenever it can be reached."""

    def __init__(self, job: UploadJob) -> None:
        settings.MLFLOW_HTTP_REQUEST_TIMEOUT.set(max(1, round(job.timeout_seconds)))
        settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
        self._job = job
        self._run_dir = Path(job.run_dir)
        self._state = _load_state(job)
        self._artifacts: list[Path] = []
        self._probes = ProbeSender(self._run_dir)
        self._client: MlflowClient | None = None
        self._next_try = 0.0
        self._first_sample: float | None = None
        self._pause = _FIRST_PAUSE_SECONDS

    def add_artifact(self, path: Path) -> None:
        """Copies a file to MLflow with the next upload."""
        if path not in self._artifacts:
            self._artifacts.append(path)

    def work(self, *, at_once: bool = False) -> bool:
        """Sends everything that is there; after a failure it pauses, longer each time.

        Args:
            at_once: Try even if the pause is not over.

        Returns:
            True if MLflow has everything.
        """
        if not at_once and time.monotonic() < self._next_try:
            return False
        try:
            self._upload(self._connect())
        except _OUTAGES as error:
            self._note("down", f"{type(error).__name__}: {error}".splitlines()[0][:300])
            self._next_try = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
            return False
        self._pause = _FIRST_PAUSE_SECONDS
        self._note("up", "")
        return True

    def end(self, status: str) -> bool:
        """Sets how the run ended; True if MLflow took it."""
        client, run_id = self._client, self._state.run_id
        if client is None or run_id is None:
            return False
        try:
            client.set_tag(run_id, _STATUS_TAG, status)
            client.set_terminated(run_id, _MLFLOW_STATUS.get(status, "KILLED"))
        except _OUTAGES as error:
            self._note("down", str(error)[:300])
            return False
        return True

    def _connect(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        client = MlflowClient(tracking_uri=self._job.tracking_uri)
        run_id = self._job.run_id or self._state.run_id
        if run_id is None or not _exists(client, run_id):
            run_id = _find_run(client, self._job, self._run_name())
        if run_id != self._state.run_id:
            self._state = UploadState(tracking_uri=self._job.tracking_uri, run_id=run_id)
            self._save()
        if self._job.is_training:
            client.update_run(run_id, status="RUNNING")
            client.set_tag(run_id, _STATUS_TAG, "running")
        self._client = client
        return client

    def _upload(self, client: MlflowClient) -> None:
        run_id = self._state.run_id or ""
        self._upload_config(client, run_id)
        self._upload_lines(client, run_id, METRICS_FILE)
        self._upload_lines(client, run_id, SYSTEM_FILE)
        self._probes.send(client, run_id, self._state.probes, self._state.nested, self._save)
        while self._artifacts:
            if self._artifacts[0].exists():
                client.log_artifact(run_id, str(self._artifacts[0]))
            self._artifacts.pop(0)

    def _upload_config(self, client: MlflowClient, run_id: str) -> None:
        path = self._run_dir / CONFIG_FILE
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text or digest == self._state.config_digest:
            return
        known = client.get_run(run_id).data.params
        values = {mlflow_name(k): v for k, v in _flat(YAML(typ="safe").load(text))}
        # MLflow refuses to change a parameter; a resume may have: the new value becomes a tag.
        fresh = [Param(k, v) for k, v in values.items() if k not in known]
        changed = [RunTag(f"changed.{k}", v) for k, v in values.items() if known.get(k, v) != v]
        for i in range(0, len(fresh), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=fresh[i : i + _PARAMS_PER_BATCH])
        for i in range(0, len(changed), _PARAMS_PER_BATCH):
            client.log_batch(run_id, tags=changed[i : i + _PARAMS_PER_BATCH])
        client.log_artifact(run_id, str(path))
        self._state.config_digest = digest
        self._save()

    def _upload_lines(self, client: MlflowClient, run_id: str, name: str) -> None:
        path = self._run_dir / name
        start = self._state.uploaded.get(name, 0)
        if path.exists() and path.stat().st_size < start:
            start = 0  # Another file has taken its place.
        while (lines := read_json_lines(path, start, _READ_BYTES)).end != start:
            points = [point for record in lines.records for point in self._points(name, record)]
            for i in range(0, len(points), _METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=points[i : i + _METRICS_PER_BATCH])
            start = self._state.uploaded[name] = lines.end
            self._save()

    def _points(self, name: str, record: dict[str, Any]) -> Iterator[Metric]:
        if name == SYSTEM_FILE:
            named = {k if "/" in k else f"system/{k}": v for k, v in record.items() if k != "time"}
            if self._first_sample is None:
                self._first_sample = _first_time(self._run_dir / name)
            yield from points(named, record["time"], round(record["time"] - self._first_sample))
            return
        step = record["step"]
        is_due = step % self._job.log_every_steps == 0
        if is_due or record.get("health") or record.get("skipped"):
            yield from points(_step_values(record), record["time"], step)

    def _run_name(self) -> str:
        """What identifies the run on the server, whatever folder it is moved to."""
        info = read_run_info(self._run_dir)
        # Quotes would end the search for it too early.
        return mlflow_name(str(info.get("run_id") or self._run_dir))

    def _note(self, state: str, error: str) -> None:
        if (state, error) != (self._state.state, self._state.error):
            self._state.state, self._state.error = state, error
            self._save()

    def _save(self) -> None:
        state = self._state
        content = {name: getattr(state, name) for name in UploadState.__slots__}
        write_json(self._run_dir / MLFLOW_FILE, content)


def _load_state(job: UploadJob) -> UploadState:
    """The state of the last start; a fresh one if the run now goes to another MLflow."""
    content = read_json_object(Path(job.run_dir) / MLFLOW_FILE)
    if content.get("tracking_uri") != job.tracking_uri:
        return UploadState(tracking_uri=job.tracking_uri)
    known = {name: content[name] for name in UploadState.__slots__ if name in content}
    return UploadState(**known)


def _exists(client: MlflowClient, run_id: str) -> bool:
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _find_run(client: MlflowClient, job: UploadJob, name: str) -> str:
    """The run's MLflow run: found by its tag if a crash lost the id, created otherwise."""
    experiment = client.get_experiment_by_name(job.experiment)
    experiment_id = experiment.experiment_id if experiment else _new_experiment(client, job)
    found = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{name}'", max_results=1)
    if found:
        return found[0].info.run_id
    run_dir = Path(job.run_dir)
    tags = {_RUN_TAG: name, "jepa.folder": str(run_dir), "mlflow.source.name": "jepa"}
    tags["jepa.host"] = socket.gethostname()
    start = (read_run_info(run_dir).get("starts") or [{}])[-1]
    tags["mlflow.source.git.commit"] = str(start.get("code", "unknown"))
    tags |= {f"jepa.{key}": str(value) for key, value in start.get("machine", {}).items()}
    return client.create_run(experiment_id, tags=tags, run_name=run_dir.name).info.run_id


def _new_experiment(client: MlflowClient, job: UploadJob) -> str:
    # Beside a database file, not in whatever folder the run was started from.
    path = job.tracking_uri.removeprefix("sqlite:///")
    is_file = path != job.tracking_uri
    artifacts = (Path(path).parent / "mlartifacts").as_uri() if is_file else None
    return client.create_experiment(job.experiment, artifact_location=artifacts)


def _step_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a line of metrics.jsonl under the names they have in MLflow."""
    grouped = {"terms": "loss_terms/", "health": "health/"}
    values = {key: value for key, value in record.items() if key not in _NOT_PLOTTED}
    for key, prefix in grouped.items():
        values |= {f"{prefix}{name}": value for name, value in (record.get(key) or {}).items()}
    seconds = max(record["step_seconds"], 1e-9)
    values["clips_per_second"] = record["clips"] / seconds
    values["tokens_per_second"] = record["tokens"] / seconds
    return values


def _first_time(path: Path) -> float:
    """Samples are no steps: MLflow's step is the seconds since this first one."""
    return float(read_json_lines(path, 0, _READ_BYTES).records[0]["time"])


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of a configuration tree; texts that are too long are clipped."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(item, f"{prefix}.{index}")
    else:
        text = str(value)
        clipped = text if len(text) <= _PARAM_CHARACTERS else text[: _PARAM_CHARACTERS - 1] + "…"
        yield prefix, clipped
