"""Tokens that masks keep, and the FLOPs of training on them; what networks there are."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pipeline.clip import Grid
from pipeline.errors import ConfigError
from pipeline.masks.blocks import check_masks
from pipeline.masks.sample import sample_masks
from pipeline.models.encoder import EncoderConfig
from pipeline.models.predictor import PredictorConfig
from pipeline.run import RunConfig
from pipeline.stages import total_steps

# Standard error of the mean tokens: about 1 % for the short-range mask at 24 clips, 4 % for the
# long-range one, and under 1 % of the FLOPs.
_SAMPLED_MICRO_BATCHES = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """The networks whose memory this package can tell."""

    encoder: EncoderConfig
    predictor: PredictorConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptTokens:
    """Tokens that one mask keeps of each clip of one micro-batch."""

    contexts: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskTokens:
    """Tokens one mask keeps of a clip, after truncation by the masks' rule."""

    context_mean: float
    target_mean: float
    context_max: int
    """Mean over the clips of the micro-batch that keeps most: what memory has to hold."""
    target_max: int


def networks_of(config: RunConfig) -> Networks:
    """Encoder and predictor of the run's objective.

    Raises:
        ConfigError: The objective has others than these.
    """
    encoder = getattr(config.objective, "encoder", None)
    predictor = getattr(config.objective, "predictor", None)
    if isinstance(encoder, EncoderConfig) and isinstance(predictor, PredictorConfig):
        return Networks(encoder=encoder, predictor=predictor)
    raise ConfigError(
        "expected an objective with an encoder and a predictor, got "
        f"{type(config.objective).__module__}",
        remedy="`jepa plan` knows the memory of masked prediction with a teacher, not of this one.",
    )


def mean_flops(config: RunConfig, grid: Grid, drawn: Sequence[Sequence[KeptTokens]]) -> float:
    """Model FLOPs of training on one clip, averaged over the clips of sampled micro-batches."""
    # Attention costs the square of a length: clips of different lengths are counted one by one.
    clips = chain.from_iterable(map(_by_clip, drawn))
    return float(np.mean([config.objective.training_flops(grid, clip) for clip in clips]))


def sample_kept_tokens(
    config: RunConfig, stage_index: int, most: int = _SAMPLED_MICRO_BATCHES
) -> list[list[KeptTokens]]:
    """What each mask keeps, in evenly spread micro-batches of a stage; [micro-batch][mask].

    Args:
        config: The run.
        stage_index: Which of its stages.
        most: Micro-batches that are drawn at most.

    Raises:
        ConfigError: A mask does not fit the stage's grid.
    """
    stage = config.stages[stage_index]
    masks = config.masks_of(stage)
    grid = config.grid(stage.frames, stage.resolution)
    check_masks(masks.blocks, grid)
    first = total_steps(config.stages[:stage_index]) * config.global_batch
    num_micro_batches = stage.steps * config.global_batch // stage.micro_batch
    num_taken = min(num_micro_batches, most)
    drawn = []
    for number in np.linspace(0, num_micro_batches - 1, num_taken, dtype=np.int64).tolist():
        start = first + number * stage.micro_batch
        positions = range(start, start + stage.micro_batch)
        drawn.append(
            [
                KeptTokens(contexts=contexts, targets=targets)
                for contexts, targets in (
                    zip(*mask.kept(), strict=True)
                    for mask in sample_masks(masks, grid, config.seed, positions)
                )
            ]
        )
    return drawn


def summarise(drawn: Sequence[Sequence[KeptTokens]]) -> tuple[MaskTokens, ...]:
    """Mean and largest numbers per mask."""
    return tuple(
        MaskTokens(
            context_mean=float(np.mean([kept.contexts for kept in mask])),
            target_mean=float(np.mean([kept.targets for kept in mask])),
            context_max=max(math.ceil(np.mean(kept.contexts)) for kept in mask),
            target_max=max(math.ceil(np.mean(kept.targets)) for kept in mask),
        )
        for mask in zip(*drawn, strict=True)
    )


def _by_clip(kept: Sequence[KeptTokens]) -> Iterator[tuple[tuple[float, float], ...]]:
    """(context, target) of all masks, clip by clip."""
    return zip(*(zip(mask.contexts, mask.targets, strict=True) for mask in kept), strict=True)
