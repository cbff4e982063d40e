"""What a run records of its steps and events, and how tracking is configured."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, field_validator, model_validator

from pipeline.clip import StepReport
from pipeline.config.section import Section
from pipeline.track.folder import EVENTS_FILE, METRICS_FILE
from pipeline.track.jsonl import read_json_lines

RunStatus = Literal["finished", "stopped", "failed"]

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_READ_BYTES = 2**22
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class MlflowConfig(Section):
    """Sending a run's numbers to MLflow, beside the files that always hold them."""

    enabled: bool = True
    """Send the run to MLflow; metrics.jsonl is written either way."""
    tracking_uri: str | None = None
    """`sqlite:///FILE`, or http(s) address of a server; the file mlflow.db beside the run's folder
    if null. Credentials never stand here: MLflow reads them from its environment variables."""
    experiment: str = Field(default="jepa", min_length=1, max_length=200)
    """Name of the MLflow experiment that holds the run; created if missing."""
    system_metrics: bool = True
    """Sample processor, memory, network and GPU use of the machine of rank 0."""
    system_metrics_every_seconds: float = Field(default=10.0, gt=0.0)
    """Seconds between two samples of the machine's use."""
    upload_every_seconds: float = Field(default=5.0, gt=0.0)
    """Seconds between two uploads; raise it if many runs share a server."""
    timeout_seconds: float = Field(default=10.0, gt=0.0)
    """Seconds after which a request to the server counts as failed; it is sent again later."""
    allow_plain_http: bool = False
    """Permit http:// to another machine, where anyone on the way can read and alter the run."""

    @field_validator("tracking_uri")
    @classmethod
    def _uri_is_usable(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        parts = urlsplit(uri)
        scheme = parts.scheme.split("+")[0]
        if scheme not in (*_DATABASES, "http", "https"):
            raise ValueError(
                f"expected sqlite:///FILE or an http(s) address, got {uri!r} "
                "(MLflow no longer keeps runs in plain folders)"
            )
        if parts.password is not None and scheme in ("http", "https"):
            raise ValueError(
                "expected an address without user and password, since this file is copied to "
                "every place the run is shown; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, instead"
            )
        return uri

    @model_validator(mode="after")
    def _http_stays_on_this_machine(self) -> "MlflowConfig":
        parts = urlsplit(self.tracking_uri or "")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not self.allow_plain_http:
            raise ValueError(
                f"expected https for the MLflow server {parts.hostname}, got http: use https, or "
                "set track.mlflow.allow_plain_http: true if the network in between is trusted"
            )
        return self


def sends_in_clear(config: MlflowConfig) -> bool:
    """Whether what goes to MLflow can be read on its way by others."""
    parts = urlsplit(config.tracking_uri or "")
    return config.enabled and parts.scheme == "http" and parts.hostname not in _LOOPBACK


class PrometheusConfig(Section):
    """An address where Prometheus reads how the run is doing; k8s/grafana has a board for it."""

    enabled: bool = False
    """Serve the newest step's figures on rank 0's machine."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen at; the loopback unless told, since whoever reaches it can read it."""
    port: int = Field(default=9464, ge=1, le=65535)
    """TCP port of `http://host:port/metrics`."""


class TrackConfig(Section):
    """What is recorded of a run, and where it is shown."""

    log_every_steps: int = Field(default=10, ge=1)
    """Steps between two lines of a console that is no terminal, and between two points sent to
    MLflow; metrics.jsonl gets every step."""
    health_every_steps: int = Field(default=50, ge=1)
    """Steps between two measurements of feature rank and spread; each costs a few milliseconds."""
    peak_tflops: PositiveFloat | Literal["measured"] | None = None
    """Peak TFLOP/s of one device at the run's precision, of which the share that is reached is
    reported; the maker's figure for the GPU in dense bf16 if null (H100 SXM or H200: 989), and
    with `measured` that of a large matrix product on the device at start."""
    mlflow: MlflowConfig = MlflowConfig()
    """Sending the run to MLflow."""
    prometheus: PrometheusConfig = PrometheusConfig()
    """Letting Prometheus read the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What the trackers know of a stage: enough for progress, time left, and reports."""

    name: str
    steps: int
    flops_per_step: float
    """Model FLOPs of one optimiser step; only ratios between stages are used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedStep:
    """A step as it stands in metrics.jsonl."""

    time: float
    """When the step ended, unix seconds."""
    report: StepReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A line of events.jsonl: start, resume, stage, save, stop, end, fault, skip and others."""

    time: float
    name: str
    step: int | None
    details: dict[str, Any]
    """All other fields of the line."""


def read_metrics(run_dir: Path) -> tuple[LoggedStep, ...]:
    """The steps that count, ascending, without those that a resume has superseded.

    When the step number falls back, the run was resumed from before: all lines kept so far with
    that number or a higher one are superseded and dropped.
    """
    return without_superseded(read_all_metrics(run_dir))


def without_superseded(steps: Iterable[LoggedStep]) -> tuple[LoggedStep, ...]:
    """Of steps in the order taken, those that no later resume has superseded."""
    kept: list[LoggedStep] = []
    for step in steps:
        while kept and kept[-1].report.step >= step.report.step:
            kept.pop()
        kept.append(step)
    return tuple(kept)


def read_all_metrics(run_dir: Path) -> tuple[LoggedStep, ...]:
    """Every step in the order in which it was taken, superseded ones included."""
    path, steps, start = run_dir / METRICS_FILE, list[LoggedStep](), 0
    # In parts: a long run's lines as dictionaries take several times the memory of its steps.
    while (lines := read_json_lines(path, start, _READ_BYTES)).end != start:
        steps += [step for step in map(logged_step, lines.records) if step is not None]
        start = lines.end
    return tuple(steps)


def read_events(run_dir: Path) -> tuple[Event, ...]:
    """All events in the order in which they happened."""
    return tuple(_events(read_json_lines(run_dir / EVENTS_FILE).records))


def logged_step(record: dict[str, Any]) -> LoggedStep | None:
    """A line of metrics.jsonl; None if it is no such line.

    Keys that this version does not know are ignored, so that an older version can read on.
    """
    values: dict[str, Any] = {}
    for field in fields(StepReport):
        if field.name in record:
            values[field.name] = _from_json(record[field.name], field.type)
        elif field.default is MISSING:
            return None
    time = record.get("time")
    return LoggedStep(time=float(time), report=StepReport(**values)) if time is not None else None


def _from_json(value: Any, kind: Any) -> Any:
    """Undoes what JSON cannot say: a null where a number belongs was not finite."""
    if value is None and kind is float:
        return math.nan
    if isinstance(value, dict):
        return {key: math.nan if item is None else item for key, item in value.items()}
    return value


def _events(records: tuple[dict[str, Any], ...]) -> Iterator[Event]:
    for record in records:
        if "time" not in record or "event" not in record:
            continue
        details = {k: v for k, v in record.items() if k not in ("time", "event", "step")}
        yield Event(
            time=float(record["time"]),
            name=str(record["event"]),
            step=record.get("step"),
            details=details,
        )
