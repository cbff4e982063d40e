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
    save_head: bool = False
    """Keep the weights of the chosen attentive head of each seed, in `OUT/heads`."""
    given_head: Path | None = None
    """An attentive head that was fitted elsewhere; it is scored, and nothing is fitted."""

    @property
    def label(self) -> str:
        """What is probed, in progress bars."""
        return self.source.name if self.step is None else f"step {self.step}"

    @property
    def stem(self) -> str:
        """Begins the names of all files of this checkpoint and task."""
        step = "imported" if self.step is None else f"step{self.step:08d}"
        return f"{self.task.name}-{step}-{self.which}"

    def head_path(self, seed: int) -> Path:
        """Where the weights of an attentive head are kept."""
        return self.out / "heads" / f"{self.stem}-attentive-seed{seed}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeProgress:
    """How far a part of a probe has come."""

    phase: str
    done: int
    total: int
    note: str = ""
    """Something to be told once, such as how large features will be; `phase` is empty then."""


Report = Callable[[ProbeProgress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """One class on validation."""

    name: str
    num_clips: int
    num_right: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HardClip:
    """A validation clip to whose class the head gave little."""

    key: str
    position: int
    """Place in the split."""
    label: int
    predicted: int
    share: float
    """What the right class got."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRecord:
    """One head with one seed on one checkpoint.

    `RUN/probes/TASK-STEP-WHICH.json` holds those of one checkpoint and task: what they share once,
    and the fields of `SCORE_FIELDS` for each under `scores`.
    """

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
    class_names: tuple[str, ...]
    num_faults: dict[str, int]
    """Videos of each split that could not be used."""
    faults: list[dict[str, str]]
    """All of them: split, key, path and reason."""
    features: list[str]
    """Size of the features, and where the attentive head's tokens came from."""
    rule: str
    """How the scored head was chosen."""
    rules: list[dict[str, Any]]
    """Name, words, choice, top1 and top5 by every rule, the task's own first."""
    choice: dict[str, float]
    curve: list[dict[str, float | None]]
    sweep: list[dict[str, float | None]]
    """Every head of the sweep."""
    per_class: list[ClassScore]
    confusion: list[tuple[int, int, int]]
    """(class, answer, clips) for every pair that occurs."""
    hardest: list[HardClip]
    seconds: float
    """Fitting and scoring this head, without encoding that was done before."""
    encoder_digest: str
    task_digest: str
    task_config: dict[str, Any]
    written: float
    """Unix seconds."""


SCORE_FIELDS = frozenset(
    {
        *("head", "seed", "top1", "top5", "top1_interval", "num_train", "num_val", "rule", "rules"),
        *("choice", "curve", "sweep", "per_class", "confusion", "hardest", "seconds"),
    }
)
"""What belongs to one head and seed; everything else to the checkpoint and task."""


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """95 % interval of a share seen in `num` draws (Wilson 1927); useful at 0 and 1 too."""
    z = 1.96
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return max(0.0, middle - half), min(1.0, middle + half)
