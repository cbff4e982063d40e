"""The teacher's exponential moving average, kept on local shards, never gathered.

The average is fp32 whatever the teacher computes in: with a momentum of 0.99925 an update changes
a weight by 7.5e-4 of the difference, less than half a bf16 step, so an average kept in bf16 would
stand still. Each rank updates only the piece that it owns, from its own piece of the optimiser's
fp32 weights; the teacher's (perhaps bf16) storage is then written from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragedShard:
    """This rank's piece of one averaged parameter, flat.

    Under ZeRO-3 rank r owns the elements [r·k, (r+1)·k) of the flattened parameter, the last
    piece padded, with k = ceil(numel / world size). Without partitioning k is `numel`.
    """

    name: str
    numel: int
    """Elements of the whole parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    student_fp32: Callable[[], Tensor]
    """Gives the student's fp32 piece [k] as it stands after the optimiser's step."""
    storage: Tensor
    """The teacher's live piece [k], in the dtype that it computes in."""


@dataclass(frozen=True, kw_only=True)
class TeacherAverage:
    """θ̄ ← m·θ̄ + (1−m)·θ over all parameters, norms and biases too (arXiv 2506.09985)."""

    shards: Sequence[AveragedShard]
    refresh: Callable[[], None]
    """Rebuilds live copies that are not the storage itself (ZeRO-3's small parameters)."""
    _average: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Makes the teacher an exact copy of the student, as at the start of a run."""
        for shard in self.shards:
            if shard.storage.dtype == torch.float32:
                self._average[shard.name] = shard.storage
                shard.storage.copy_(shard.student_fp32())
            else:
                self._average[shard.name] = shard.student_fp32().detach().float().clone()
        self._publish()

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Moves the average toward the student, after the optimiser's step."""
        if not self.shards:
            return
        students = [shard.student_fp32() for shard in self.shards]
        averages = [self._average[shard.name] for shard in self.shards]
        # One kernel for all parameters on a GPU.
        torch._foreach_lerp_(averages, students, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        self._publish()

    def pieces(self) -> dict[str, Tensor]:
        """The fp32 average by parameter name: this rank's pieces, flat, live."""
        return dict(self._average)

    @torch.no_grad()
    def load(self, pieces: dict[str, Tensor]) -> None:
        """Restores what `pieces` gave, on the same rank of the same world.

        Raises:
            KeyError: A parameter is missing.
            ValueError: A piece has another length.
        """
        for shard in self.shards:
            piece = pieces[shard.name]
            if piece.shape != self._average[shard.name].shape:
                raise ValueError(
                    f"{shard.name}: expected a piece of {self._average[shard.name].numel()} "
                    f"elements, got {piece.numel()}"
                )
            self._average[shard.name].copy_(piece)
        self._publish()

    def _publish(self) -> None:
        for shard in self.shards:
            average = self._average[shard.name]
            if average is not shard.storage:
                shard.storage.copy_(average)
        self.refresh()
