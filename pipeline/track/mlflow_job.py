"""What the uploading process is told; apart, so that either side loads only what it needs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadJob:
    """Everything the uploading process is told; travels as one line of JSON."""

    run_dir: str
    tracking_uri: str
    is_training: bool
    """True if the run is going on, False to send what is left of it."""
    experiment: str
    run_id: str | None
    """An MLflow run to attach to; None for the run's own."""
    log_every_steps: int
    upload_every_seconds: float
    timeout_seconds: float
    system_metrics_every_seconds: float | None
