"""The vocabulary of the path of a clip: what crosses from one file to the next.

Shape letters, used in names' suffixes and end-of-line comments throughout the project:

    B  clips in a micro-batch         C  colour channels (3)
    T  frames of a clip               H, W  height and width in pixels
    N  tokens of a clip, t-h-w order  K  tokens kept as context or asked for as target
    D  width of a token's feature     L  layers
    S  numbers in a state vector      A  numbers in an action vector
    P  tokens of several clips and masks, one sequence after the other
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """How a clip is cut into tokens: counts along time, height and width."""

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole clip; a token's index is (t · H + h) · W + w."""
        return self.t * self.h * self.w


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRef:
    """Which sample stands at a global position: a pure function of (seed, position)."""

    position: int
    source: int
    sample: int
    epoch: int
    attempt: int = 0
    """0 for the sample the order names; n for the n-th deterministic substitute of a bad one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFault:
    """One sample that could not be used, and which position it would have filled."""

    position: int
    dataset: str
    shard: str
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One decoded, cropped clip.

    `video_CTHW` is uint8 RGB (normalised on the device), `times` the presentation times of its
    frames in seconds from the start of the video, float64 [T].
    """

    ref: ClipRef
    key: str
    video_CTHW: Tensor
    times: Tensor
    text: str | None = None
    states: Tensor | None = None
    actions: Tensor | None = None
    faults: tuple[SampleFault, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskSet:
    """One mask of every clip of a micro-batch, as ascending token indices.

    Context and target never share a token; tokens cut by truncation are in neither. Where clips
    keep different numbers of tokens, rows are padded with index 0 beyond their length, and what
    stands there must never be read.
    """

    context_BK: Tensor
    target_BK: Tensor
    context_lengths: tuple[int, ...] | None = None
    """Tokens of each row of `context_BK`, known to the host; None if all rows are full."""
    target_lengths: tuple[int, ...] | None = None
    """Tokens of each row of `target_BK`, known to the host; None if all rows are full."""

    def kept(self) -> tuple[tuple[int, int], ...]:
        """(context, target) tokens of each clip, without asking the device."""
        num_clips, context = self.context_BK.shape
        target = self.target_BK.shape[1]
        contexts = self.context_lengths or (context,) * num_clips
        targets = self.target_lengths or (target,) * num_clips
        return tuple(zip(contexts, targets, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """One micro-batch: consecutive global positions, all of one stage's size.

    `video_BCTHW` is uint8 RGB until an objective normalises it; `states_BTS`, `actions_BTA`
    (float32) and `text` are there only if the shards carry them.
    """

    step: int
    stage: int
    first_position: int
    grid: Grid
    keys: tuple[str, ...]
    refs: tuple[ClipRef, ...]
    video_BCTHW: Tensor
    times_BT: Tensor
    masks: tuple[MaskSet, ...] = ()
    text: tuple[str | None, ...] | None = None
    states_BTS: Tensor | None = None
    actions_BTA: Tensor | None = None
    faults: tuple[SampleFault, ...] = ()

    def to(self, device: torch.device) -> "ClipBatch":
        """The same batch with its tensors on `device` (asynchronously from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "ClipBatch":
        """Called by torch's DataLoader in its pinning thread."""
        return self._map(lambda tensor: tensor.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the batch."""
        for mask in self.masks:
            yield from (mask.context_BK, mask.target_BK)
        values = (getattr(self, field.name) for field in fields(self))
        yield from (value for value in values if isinstance(value, Tensor))

    def _map(self, function: Any) -> "ClipBatch":
        changed: dict[str, Any] = {
            "masks": tuple(
                replace(m, context_BK=function(m.context_BK), target_BK=function(m.target_BK))
                for m in self.masks
            )
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchPlan:
    """One micro-batch before it exists: which positions, and the size of its clips.

    `masks` is a `MaskConfig` section; its room stands above this one, which passes it on
    without looking inside.
    """

    step: int
    """1-based optimiser step of the run."""
    stage: int
    first_position: int
    size: int
    """Clips of the micro-batch, at consecutive global positions."""
    frames: int
    fps: float
    resolution: int
    masks: Any
    grid: Grid

    @property
    def positions(self) -> range:
        """Global positions of the clips."""
        return range(self.first_position, self.first_position + self.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands when a step is taken; everything scheduled is a function of it."""

    step: int
    """1-based number of the step being taken."""
    total_steps: int
    """Steps of the whole run, all stages together."""
    stage: int
    """0-based index of the stage the step belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What an objective returns: the scalar to minimise, and its named parts for the log."""

    total: Tensor
    terms: dict[str, Tensor]
    features_ND: Tensor | None = None
    """The target's features at the same number of tokens of each clip, one clip after the other,
    detached: what collapse signals are taken from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """Everything the trackers learn of one optimiser step. Rates are per second of wall time."""

    step: int
    stage: int
    stage_name: str
    loss: float
    terms: dict[str, float]
    learning_rate: float
    weight_decay: float
    momentum: float
    gradient_norm: float
    step_seconds: float
    data_wait_seconds: float
    clips: int
    """Clips of the global batch."""
    tokens: int
    """Tokens of the global batch before masking."""
    flops: float
    """Model FLOPs of the global batch, forward and backward."""
    peak_memory_gib: float
    num_faults: int
    """Samples of this step that had to be replaced, all ranks together."""
    skipped: bool = False
    """True if the update was left out because loss or gradient was not finite."""
    health: dict[str, float] | None = None
    """Collapse signals, on the steps where they are taken."""
    hardware_flops: float = 0.0
    """Model FLOPs and those of activations computed again."""
    mfu: float | None = None
    """Model FLOPs utilisation: share of the peak of all devices; None where no peak is known."""
