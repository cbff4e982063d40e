"""What an objective is: one file in this folder with a `Config` and an `Objective`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from pipeline.clip import ClipBatch, Grid, Losses, Progress
from pipeline.config.section import Section
from pipeline.data.layout import Member
from pipeline.models.attention import AttentionConfig
from pipeline.models.teacher import TeacherAverage


class ObjectiveConfig(Section, ABC):
    """Base of every objective's configuration; each narrows `kind` to a literal naming its file."""

    kind: Any
    """Name of the objective."""

    @abstractmethod
    def grid(self, frames: int, resolution: int) -> Grid:
        """Tokens of a clip of `frames` frames at `resolution` pixels."""

    @abstractmethod
    def training_flops(self, grid: Grid, kept: Sequence[tuple[float, float]]) -> float:
        """Model FLOPs of training on one clip, forward and backward.

        Args:
            grid: Tokens of the clip.
            kept: (context, target) tokens of each mask.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A metric that shows whether the objective learns, and which way is healthy."""

    metric: str
    healthy: Literal["up", "down", "above", "below"]
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What the run decides about the networks, besides the objective's own configuration."""

    attention: AttentionConfig
    checkpoint_activations: bool


class Objective(ABC):
    """Networks and loss of one way of learning; the loop knows nothing else of it.

    Everything trainable, frozen or averaged stands in `modules()`, so that ZeRO-3 partitions it
    once. `averages` is filled by the engine, one entry for each pair of `averaged_pairs()`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({Member.VIDEO})
    """Members that every sample of the shards must have; checked against the index at start."""
    gates: ClassVar[tuple[Gate, ...]] = ()
    """Metrics that show learning."""
    averages: Sequence[TeacherAverage] = ()

    @abstractmethod
    def modules(self) -> nn.ModuleDict:
        """All networks by name; those with `requires_grad` parameters are trained."""

    @abstractmethod
    def loss(self, batch: ClipBatch, progress: Progress) -> Losses:
        """The loss of one micro-batch, a mean over its clips."""

    def averaged_pairs(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """(student, teacher) pairs of modules of one shape, the second an average of the first."""
        return ()

    def after_step(self, progress: Progress) -> dict[str, float]:  # noqa: ARG002
        """What follows the optimiser's step, such as moving the teacher.

        Returns:
            Values for the log, such as the teacher's momentum.
        """
        return {}

    @abstractmethod
    def encoder(self) -> nn.Module:
        """The network that probes and exports take."""
