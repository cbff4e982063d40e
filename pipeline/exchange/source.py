"""What an import has found: networks, where each tensor comes from, and what was decided."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.exchange.layout import Networks
from pipeline.exchange.sizes import Heads
from pipeline.exchange.tensors import Tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What a source does not tell about itself, and whoever imports it may know."""

    heads: Heads = field(default_factory=Heads)
    positions: Literal["rope", "sincos"] = "rope"
    """How an official checkpoint's tokens know their place: V-JEPA 2's, or V-JEPA 1's tables."""
    frames: int | None = None
    """Frames of the clips seen last in training."""
    resolution: int | None = None
    """Their height and width in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Networks of any origin under our names, none of their tensors in memory yet."""

    networks: Networks
    tensors: Tensors
    """`encoder.*`, and `teacher.*` and `predictor.*` where there are any."""
    provenance: Mapping[str, Any]
    """Where they are from."""
    notes: tuple[str, ...] = ()
    """What was left out or assumed, in sentences."""
    commit_dir: Path | None = None
    """The checkpoint of a run, if that is what the source is."""

    def encoder(self, which: str) -> Tensors:
        """The encoder called for: `teacher` or `student`; the only one if there is one."""
        teacher = self.tensors.below("teacher.")
        if which == "teacher" and teacher.shapes:
            return teacher
        return self.tensors.below("encoder.")

    @property
    def has_teacher(self) -> bool:
        """Whether student and teacher are kept apart."""
        return any(name.startswith("teacher.") for name in self.tensors.shapes)
