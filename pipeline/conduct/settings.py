"""What is done with every checkpoint of a run beside its training: the file `conduct.yaml`.

Everything has a default that needs no other machine: verify, health verdict and report.
"""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section
from pipeline.probe.tasks import HeadName

Every = Annotated[int, Field(ge=1)] | None
"""Steps between the checkpoints that something is done with; None for all of them."""


class Resources(Section):
    """What a job takes of Ray while it runs."""

    num_cpus: float = Field(default=1.0, gt=0.0)
    """CPUs that Ray sets aside; as many threads compute."""
    num_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs that Ray sets aside; with 0 the job sees none, even where the machine has some."""


class MirrorConfig(Section):
    """A second place for every checkpoint."""

    url: str
    """Where to, such as s3://bucket/mirror or file:///disk2/mirror; checkpoints lie below it in a
    folder of the run's name, as with `checkpoint.store`, and a run can be resumed from there."""
    keep: Literal["all", "as_here"] = "all"
    """`as_here` removes from the mirror what was removed from the run's folder as well."""

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^@]*", url):
            raise ValueError(
                f"expected a URL such as s3://bucket/mirror with no password in it, got {url!r}"
            )
        return url


class ExportConfig(Section):
    """Weights in a form that others read."""

    formats: tuple[Literal["safetensors", "hf"], ...] = Field(
        default=("safetensors",), min_length=1
    )
    """`safetensors` is a folder that `jepa probe` and `init_from` take, `hf` one that transformers'
    AutoModel loads."""
    weights: Literal["teacher", "student"] = "teacher"
    """The averaged teacher, as evaluations use, or the student."""
    every_steps: Every = None
    """Only checkpoints at multiples of this, besides the newest of a finished run; all if null."""
    folder: Path | None = None
    """Where exports go, in a folder of the run's name; `exports` in the run's folder if null."""
    keep: Literal["all", "with_checkpoint"] = "with_checkpoint"
    """`with_checkpoint` removes an export when its checkpoint has been removed."""
    check: bool = True
    """Compare hf exports with transformers' own computation, where it is installed."""
    license: str | None = None
    """Licence of the weights, for the card."""


class ProbeConfig(Resources):
    """A probe of every checkpoint."""

    task: str = Field(min_length=1)
    """Task file, or the name of a shipped one, such as ssv2."""
    overrides: tuple[str, ...] = ()
    """key=value laid over the task file, such as max_train=2000."""
    heads: tuple[HeadName, ...] = Field(default=("linear", "knn"), min_length=1)
    """Heads that are fitted; the attentive one takes by far the longest."""
    seeds: int = Field(default=1, ge=1)
    """Seeds that every fitted head is drawn with."""
    every_steps: Every = None
    """Only checkpoints at multiples of this, besides the untrained one and the newest of a finished
    run; all if null."""


class RetentionConfig(Section):
    """Which checkpoints stay, beyond what the run's own settings keep.

    The first, the newest `checkpoint.keep_last`, and pinned ones always do. The run removes the
    others itself as it saves; when nobody owns the run any more, the conductor does.
    """

    enabled: bool = True
    """False leaves everything to the run's own settings."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints with the best probe scores that stay, so long as they are the best."""
    best_by: str | None = None
    """Which scores count, as TASK or TASK/HEAD; the mean over all probes if null."""
    keep_last: int = Field(default=1, ge=1)
    """Newest checkpoints that stay, if that is more than the run keeps."""
    keep_every_steps: Every = None
    """Once everything is done with them, only multiples of this stay of those that the run's
    `checkpoint.keep_every_steps` keeps; null keeps all of those."""
    hold_at_most: int = Field(default=4, ge=0)
    """Checkpoints that wait for their turn and stay meanwhile: more take more disk, with fewer
    some may be removed by the run unprobed when probes are slower than saves."""


class RayConfig(Resources):
    """A Ray of our own on this machine; has no meaning where one is joined with --address."""

    num_cpus: float = Field(default=1.0, gt=0.0)
    """CPUs for all jobs together: little, since the training runs on the same machine."""


class ConductConfig(Section):
    """What the conductor does."""

    keys_are_in: ClassVar[str] = "`jepa config schema --of conduct` lists every key"
    has_shipped_files: ClassVar[bool] = False

    mirror: MirrorConfig | None = None
    """Copy every checkpoint to another place; null does not."""
    export: ExportConfig | None = None
    """Write every checkpoint's networks for others to read; null does not."""
    probes: tuple[ProbeConfig, ...] = ()
    """Score every checkpoint on labelled tasks."""
    mlflow: bool = True
    """Record scores as nested runs of the run's MLflow, where the run itself goes there."""
    report: bool = True
    """Write the run's report.html again when something was found out."""
    report_every_minutes: float = Field(default=10.0, ge=0.0)
    """Minutes between two reports while the run goes on."""
    retention: RetentionConfig = RetentionConfig()
    """Which checkpoints stay."""
    ray: RayConfig = RayConfig()
    """Resources where no cluster is joined."""
    nice: int = Field(default=19, ge=0, le=19)
    """Priority of all work, as `nice` counts: 19 takes only time that the training leaves over."""
    jobs_at_once: int = Field(default=2, ge=1)
    """Jobs that run or wait for resources at a time, all runs together."""
    poll_seconds: float = Field(default=5.0, gt=0.0)
    """Seconds between two looks at the runs' folders."""
    max_failures: int = Field(default=3, ge=1)
    """A job that failed so often is recorded and left alone, until `--retry`."""
    retry_seconds: float = Field(default=10.0, ge=0.0)
    """Wait before the second attempt at a failed job; doubles with every further one."""
    idle_hours: float | None = Field(default=None, gt=0.0)
    """End when no run has shown a sign of life for so long; null waits until all have finished."""

    @model_validator(mode="after")
    def _probes_differ(self) -> Self:
        tasks = [probe.task for probe in self.probes]
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise ValueError(f"probes name {', '.join(twice)} twice: one entry takes several heads")
        return self
