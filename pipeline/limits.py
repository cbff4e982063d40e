"""What a run tolerates before it leaves a step out, raises an alarm, or stops."""

from datetime import datetime
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section


class GuardsConfig(Section):
    """What all ranks decide together before an update, and when a rank counts as hanging."""

    max_skipped_in_a_row: int = Field(default=10, ge=1)
    """Steps in a row that may be left out because loss or gradient is not finite; one more ends
    the run with exit code 79."""
    spike_window_steps: int = Field(default=128, ge=16)
    """Steps before a step, in its own stage, that its loss is compared with."""
    spike_sigmas: float = Field(default=6.0, gt=0.0)
    """A loss is a spike if it is above the window's median by this many robust standard
    deviations (1.4826 times the median distance from the median)."""
    on_spike: Literal["alarm", "skip", "rewind"] = "alarm"
    """`alarm` records it; `skip` also leaves that step's update out; `rewind` goes back to the
    checkpoint before it and leaves out the steps around it, on record in the run's folder."""
    spike_skip_steps: int = Field(default=20, ge=0)
    """Steps left out on either side of a spike after a rewind."""
    max_rewinds: int = Field(default=3, ge=1)
    """Rewinds in a run; one more ends it with exit code 79."""
    hang_seconds: float = Field(default=30.0, gt=0.0)
    """A step may take this long beyond three times the slowest of recent ones; then the run ends
    with exit code 76, a report of who hangs and every thread's stack."""
    slow_phase_seconds: float = Field(default=1800.0, gt=0.0)
    """The same limit for what has no precedent: start-up, a stage's first step, the first save."""
    straggler_every_steps: int = Field(default=20, ge=1)
    """Steps between two comparisons of the ranks' pace."""
    straggler_score: float = Field(default=0.7, gt=0.0, le=1.0)
    """A rank is slow if its pace is below this share of the middle rank's in three comparisons
    in a row."""


class StopConfig(Section):
    """When a run stops by itself, and what it has time for when it is asked to."""

    max_hours: float | None = Field(default=None, gt=0.0)
    """Hours after which an attempt has saved and stopped."""
    at: str | None = None
    """Time by which the run has saved and stopped, such as 2026-03-01T06:00:00+00:00; under Slurm
    the job's own end counts as well."""
    margin_seconds: float = Field(default=60.0, ge=0.0)
    """Kept free before a time limit, besides two steps and the longest save."""
    grace_seconds: float | None = Field(default=None, gt=0.0)
    """Seconds between a stop signal and the kill that follows it. If a save does not fit in what is
    left of them, none is begun and the last checkpoint stands; null tries in any case."""

    @field_validator("at")
    @classmethod
    def _at_is_a_time(cls, at: str | None) -> str | None:
        if at is not None:
            try:
                datetime.fromisoformat(at)
            except ValueError:
                raise ValueError(
                    f"expected a time such as 2026-03-01T06:00:00+00:00, got {at!r}"
                ) from None
        return at

    @model_validator(mode="after")
    def _at_has_a_zone(self) -> Self:
        if self.at is not None and datetime.fromisoformat(self.at).tzinfo is None:
            raise ValueError(f"at: {self.at!r} has no time zone; add +00:00 for UTC")
        return self

    @property
    def at_unix(self) -> float | None:
        """`at` as unix seconds."""
        return None if self.at is None else datetime.fromisoformat(self.at).timestamp()
