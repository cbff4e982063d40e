"""FLOPs of a micro-batch for the tokens that its masks really keep."""

from collections.abc import Iterator

from pipeline.clip import ClipBatch
from pipeline.objectives.base import ObjectiveConfig
from pipeline.plan.recompute import Recomputed, recomputed_flops
from pipeline.run import RunConfig


def batch_flops(objective: ObjectiveConfig, batch: ClipBatch) -> float:
    """Model FLOPs of training on a micro-batch, forward and backward."""
    return sum(
        num_clips * objective.training_flops(batch.grid, kept)
        for num_clips, kept in _kept_by_clips(batch)
    )


def batch_recomputed_flops(config: RunConfig, batch: ClipBatch, recomputed: Recomputed) -> float:
    """FLOPs of computing a micro-batch's activations again."""
    return sum(
        num_clips * recomputed_flops(config, kept, recomputed)
        for num_clips, kept in _kept_by_clips(batch)
    )


def _kept_by_clips(batch: ClipBatch) -> Iterator[tuple[int, list[tuple[float, float]]]]:
    """(context, target) tokens of each mask, once for every group of clips that keep the same.

    Attention costs the square of a length, so clips of different lengths cannot share a mean.
    """
    groups: dict[tuple[tuple[int, int], ...], int] = {}
    rows = [mask.kept() for mask in batch.masks]
    for clip in range(len(batch.keys)):
        kept = tuple(row[clip] for row in rows)
        groups[kept] = groups.get(kept, 0) + 1
    for kept, num_clips in groups.items():
        yield num_clips, [(float(context), float(target)) for context, target in kept]
