"""What is asked of a probe, how far it is, and what it found: plain data between processes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.probe.frozen import Which
from pipeline.probe.tasks import HeadName, TaskConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRequest:
    """What is to be probed."""

    source: Path
    """`RUN/checkpoints/step-…`, an exchange folder, or a folder of transformers."""
    step: int | None
    """Training step of the weights; None where their origin does not tell."""
    which: Which
    task: TaskConfig
    heads: tuple[HeadName, ...]
    seeds: tuple[int, ...]
    out: Path
    """Folder of the results and of the features' cache; the run's `probes`."""

    @property
    def label(self) -> str:
        """What is probed, in progress bars."""
        return self.source.name if self.step is None else f"step {self.step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeProgress:
    """How far a part of a probe has come."""

    phase: str
    done: int
    total: int


Report = Callable[[ProbeProgress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRecord:
    """One head with one seed on one checkpoint: the content of a file in `RUN/probes`."""

    checkpoint: str
    which: str
    step: int | None
    """None for weights whose origin does not tell a step."""
    task: str
    head: str
    seed: int
    top1: float
    top5: float | None
    """None where there are no more than five classes."""
    top1_interval: tuple[float, float]
    """Wilson's 95 % interval: what so many validation clips can tell."""
    chance: float
    """One over the number of classes that occur in training."""
    num_train: int
    num_val: int
    num_classes: int
    num_faults: dict[str, int]
    """Videos of each split that could not be used."""
    rule: str
    """How the scored head was chosen."""
    choice: dict[str, float]
    curve: list[dict[str, float | None]]
    sweep: list[dict[str, float]]
    seconds: float
    """Fitting and scoring this head, without encoding that was done before."""
    encoder_digest: str
    task_digest: str
    task_config: dict[str, Any]
    written: float
    """Unix seconds."""

    @property
    def file_name(self) -> str:
        """Name of the record's file; the same probe again replaces it."""
        step = "imported" if self.step is None else f"step{self.step:08d}"
        return f"{self.task}-{step}-{self.which}-{self.head}-seed{self.seed}.json"


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """95 % interval of a share seen in `num` draws (Wilson 1927); useful at 0 and 1 too."""
    z = 1.96
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return max(0.0, middle - half), min(1.0, middle + half)
