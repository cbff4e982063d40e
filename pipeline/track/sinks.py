"""The one thing the loop tells what it did: files first, then the console, then MLflow.

metrics.jsonl is the truth: a step that is in no other place is still there. The console shows it,
and MLflow gets it from the file by a process of its own, so that neither can hold up a step.

After a resume, steps between the checkpoint and the end of the former attempt are logged again.
In metrics.jsonl they stand twice, and `read_metrics` keeps the later ones; in MLflow, which cannot
take a point back, both stay in the metric's history, told apart by their time.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.clip import StepReport
from pipeline.errors import StorageError
from pipeline.track.console import ConsoleSink
from pipeline.track.folder import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, SYSTEM_FILE
from pipeline.track.jsonl import JsonLinesWriter
from pipeline.track.ledger import run_ledger
from pipeline.track.metrics import (
    Event,
    LoggedStep,
    RunStatus,
    StageCost,
    TrackConfig,
)
from pipeline.track.mlflow_sink import MlflowSink
from pipeline.track.prometheus import PrometheusEndpoint


class Tracker:
    """Records a run. On ranks other than the first it does nothing, so callers need not ask.

    Call `start`, then `log` after every step, `event` for whatever happens (the first one being
    `start` or `resume`), and `close` at the end, whatever the end is.

    Args:
        config: The run's `track` section.
        plan: All stages of the run, for progress and the time left.
        world_size: Ranks that share the global batch.
        is_main: True on the one rank that records.
        mlflow_run_id: Attach to this MLflow run instead of the run's own.
        console: Where to show progress; standard output by default.
    """

    def __init__(
        self,
        config: TrackConfig,
        *,
        plan: Sequence[StageCost] = (),
        world_size: int = 1,
        is_main: bool = True,
        mlflow_run_id: str | None = None,
        console: Console | None = None,
    ) -> None:
        self._config = config
        self._is_main = is_main
        self._mlflow_run_id = mlflow_run_id
        self._console = ConsoleSink(config, plan, console=console, world_size=world_size)
        self._metrics: JsonLinesWriter | None = None
        self._events: JsonLinesWriter | None = None
        self._mlflow: MlflowSink | None = None
        self._prometheus: PrometheusEndpoint | None = None
        self._num_steps = sum(stage.steps for stage in plan)
        self._run_dir = Path()

    def start(self, run_dir: Path, config_yaml: str, *, resume: bool) -> None:
        """Opens the run's records; appends to those of earlier attempts.

        Args:
            run_dir: The run's folder, which exists.
            config_yaml: The resolved configuration; written to the folder if it is not there yet.
            resume: False demands that no steps have been recorded here.

        Raises:
            StorageError: If a file cannot be written, or a fresh run would mix with another.
        """
        if not self._is_main:
            return
        metrics = run_dir / METRICS_FILE
        if not resume and metrics.exists() and metrics.stat().st_size > 0:
            raise StorageError(
                f"{metrics} already holds the steps of a run.",
                remedy="Continue it with `jepa resume`, or give the new run another name.",
            )
        if not (run_dir / CONFIG_FILE).exists():
            _write_text(run_dir / CONFIG_FILE, config_yaml)
        self._metrics = JsonLinesWriter(metrics)
        self._events = JsonLinesWriter(run_dir / EVENTS_FILE)
        self._run_dir = run_dir
        if self._config.mlflow.enabled:
            if resume:
                self._record_ledger()
            self._mlflow = MlflowSink(self._config, run_dir, run_id=self._mlflow_run_id)
            self._pass_on(self._mlflow.start())
        if self._config.prometheus.enabled:
            self._prometheus = PrometheusEndpoint(
                self._config.prometheus, run=run_dir.name, num_steps=self._num_steps
            )
            self._prometheus.start()

    def log(self, report: StepReport) -> None:
        """Records one optimiser step; returns when it is in metrics.jsonl.

        Raises:
            StorageError: If metrics.jsonl cannot be written.
        """
        if self._metrics is None:
            return
        step = LoggedStep(time=time.time(), report=report)
        self._metrics.write({"time": step.time, **asdict(report)})
        self._console.log(step)
        if self._mlflow is not None:
            self._pass_on(self._mlflow.poll())
        if self._prometheus is not None:
            self._prometheus.log(report)
            self._pass_on(self._prometheus.take_trouble())

    def event(self, name: str, /, **fields: Any) -> None:
        """Records something that happened; `step` is the field that says when.

        The ledger reads: `start`, `resume` (a new attempt began), `save` with `seconds` (the loop
        stood still so long), and `end`, `stop` or `fault` with `reason`.
        """
        if self._events is None:
            return
        now = time.time()
        self._events.write({"time": now, "event": name, **fields})
        if self._prometheus is not None:
            self._prometheus.event(name, fields)
        details = {key: value for key, value in fields.items() if key != "step"}
        step = fields.get("step")
        self._console.event(Event(time=now, name=name, step=step, details=details))

    def artifact(self, path: Path) -> None:
        """Asks MLflow to keep a copy of a file; without MLflow this does nothing."""
        if self._mlflow is not None:
            self._pass_on(self._mlflow.artifact(path))

    def close(self, status: RunStatus) -> None:
        """Ends the records. A second call does nothing.

        Waits for MLflow's last points half a minute after a run that is finished, and five
        seconds otherwise, since a grace period is running out; the rest is sent by the next start.
        """
        if self._metrics is None or self._events is None:
            return
        self._console.close()
        self._metrics.close()
        self._events.close()
        self._metrics = self._events = None
        if self._prometheus is not None:
            self._prometheus.close()
        if self._mlflow is not None:
            self._record_ledger()
            self._pass_on(self._mlflow.close(status))

    def _record_ledger(self) -> None:
        """Where the time went so far, among the samples that go to MLflow."""
        ledger = run_ledger(self._run_dir)
        if ledger is None:
            return
        values = {f"time/{name}_seconds": seconds for name, seconds in ledger.phases.items()}
        writer = JsonLinesWriter(self._run_dir / SYSTEM_FILE)
        writer.write(
            {"time": time.time(), "time/effective_share": ledger.effective_share, **values}
        )
        writer.close()

    def _pass_on(self, warning: str | None) -> None:
        if warning is not None:
            self._console.warn(warning)


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error}") from error
