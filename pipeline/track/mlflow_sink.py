"""The run's side of MLflow: starts the uploading process and passes on what it has to say.

A process, not a thread: importing MLflow and setting up its database take seconds of the
interpreter that the loop needs, a thread's locks may be held when loader workers are forked, and
a process that hangs can be ended. It reads metrics.jsonl from where it last was, so nothing is
handed over in a step but the file itself.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from pipeline.errors import StorageError
from pipeline.track.folder import MLFLOW_FILE, read_json_object
from pipeline.track.metrics import MlflowConfig, RunStatus, TrackConfig
from pipeline.track.mlflow_job import UploadJob

MLFLOW_LOG = "mlflow.log"
_WORKER = "pipeline.track.mlflow_worker"
_POLL_SECONDS = 2.0
_URGENT_SECONDS, _PATIENT_SECONDS = 5.0, 30.0


def upload_job(
    config: TrackConfig, run_dir: Path, *, run_id: str | None = None, is_training: bool = True
) -> UploadJob:
    """The job of sending a run's records to the MLflow of its configuration."""
    mlflow = config.mlflow
    run_dir = run_dir.resolve()
    return UploadJob(
        run_dir=str(run_dir),
        tracking_uri=tracking_uri(mlflow, run_dir),
        is_training=is_training,
        experiment=mlflow.experiment,
        run_id=run_id,
        log_every_steps=config.log_every_steps,
        upload_every_seconds=mlflow.upload_every_seconds,
        timeout_seconds=mlflow.timeout_seconds,
        system_metrics_every_seconds=(
            mlflow.system_metrics_every_seconds if mlflow.system_metrics and is_training else None
        ),
    )


def tracking_uri(config: MlflowConfig, run_dir: Path) -> str:
    """The configured address, or the file mlflow.db beside the run's folder."""
    uri = config.tracking_uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).resolve()}"


class MlflowSink:
    """Owns the uploading process; no method waits for MLflow but `close`, and that is bounded.

    Args:
        config: The run's `track` section.
        run_dir: The run's folder.
        run_id: Attach to this MLflow run instead of the run's own.
        is_training: False to send what is left of a run that has ended.
    """

    def __init__(
        self,
        config: TrackConfig,
        run_dir: Path,
        *,
        run_id: str | None = None,
        is_training: bool = True,
    ) -> None:
        self._job = upload_job(config, run_dir, run_id=run_id, is_training=is_training)
        self._run_dir = run_dir
        self._worker: subprocess.Popen[bytes] | None = None
        self._next_poll = 0.0
        self._is_down = False

    def start(self) -> str | None:
        """Starts the uploading process; returns a warning if that is not possible."""
        if find_spec("mlflow") is None:
            return (
                "MLflow is not installed, so metrics go to metrics.jsonl alone: "
                "pip install 'jepa-pipeline[train]', or set track.mlflow.enabled: false."
            )
        command = [sys.executable, "-m", _WORKER]
        try:
            with (self._run_dir / MLFLOW_LOG).open("ab") as log:
                # Its own session: Ctrl-C and the signals of a preemption are not meant for it.
                self._worker = subprocess.Popen(
                    command,
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            return f"MLflow's uploading process cannot start ({error}); metrics.jsonl has all."
        # A pipe that is full must not hold up a step.
        os.set_blocking(self._stdin().fileno(), False)
        return self._tell(asdict(self._job))

    def poll(self) -> str | None:
        """Looks, at most every two seconds, whether MLflow is still served; a warning if not."""
        now = time.monotonic()
        if self._worker is None or now < self._next_poll:
            return None
        self._next_poll = now + _POLL_SECONDS
        if self._worker.poll() is not None:
            self._worker = None
            return (
                f"MLflow's uploading process ended; see {self._run_dir / MLFLOW_LOG}. "
                "metrics.jsonl has all points, the next start sends them."
            )
        return self._changed(read_json_object(self._run_dir / MLFLOW_FILE))

    def artifact(self, path: Path) -> str | None:
        """Asks the uploading process to copy a file; a warning if it cannot be asked."""
        return self._tell({"artifact": str(path.resolve())})

    def close(self, status: RunStatus, *, is_urgent: bool | None = None) -> str | None:
        """Lets the uploading process finish for a bounded time; a warning if points are left.

        Args:
            status: How the run ended.
            is_urgent: Wait five seconds instead of thirty; by default only after a finished run
                is there time.
        """
        if self._worker is None:
            return None
        urgent = status != "finished" if is_urgent is None else is_urgent
        seconds = _URGENT_SECONDS if urgent else _PATIENT_SECONDS
        self._tell({"close": status, "seconds": seconds * 0.8})
        self._stdin().close()
        worker, self._worker = self._worker, None
        try:
            code = worker.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            code = -1
        if code == 0:
            return None
        return (
            "Not all points are in MLflow yet; metrics.jsonl has them. The next start of this "
            f"run or `jepa report {self._run_dir}` sends the rest."
        )

    def _changed(self, state: dict[str, object]) -> str | None:
        """One sentence when MLflow goes down, one when it is back."""
        was_down, self._is_down = self._is_down, state.get("state") == "down"
        if self._is_down and not was_down:
            return (
                f"MLflow at {state.get('tracking_uri')} does not answer ({state.get('error')}). "
                "The run goes on; metrics.jsonl has all points and they are sent later."
            )
        if was_down and not self._is_down:
            return "MLflow answers again; the points it missed are being sent."
        return None

    def _tell(self, message: dict[str, object]) -> str | None:
        if self._worker is None:
            return None
        try:
            written = self._stdin().write(json.dumps(message).encode() + b"\n")
        except OSError as error:
            return f"MLflow's uploading process does not listen ({error})."
        return None if written else "MLflow's uploading process does not listen (its pipe is full)."

    def _stdin(self) -> IO[bytes]:
        if self._worker is None or self._worker.stdin is None:
            raise StorageError("MLflow's uploading process has not been started.")
        return self._worker.stdin


def mlflow_run_id(run_dir: Path) -> str | None:
    """The MLflow run of a run's folder, if it has one yet."""
    found = read_json_object(run_dir / MLFLOW_FILE).get("run_id")
    return str(found) if found else None
