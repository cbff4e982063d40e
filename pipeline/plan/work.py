"""Tokens that masks keep, and the FLOPs of training on them; what networks there are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.clip import Grid
from pipeline.errors import ConfigError
from pipeline.masks.blocks import check_masks, sample_masks
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
    """Tokens per clip that one mask keeps in one micro-batch."""

    context: int
    target: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskTokens:
    """Tokens one mask keeps, per clip, after truncation to the shortest of a micro-batch."""

    context_mean: float
    target_mean: float
    context_max: int
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
    """Model FLOPs of training on one clip, averaged over the sampled micro-batches."""
    return float(
        np.mean(
            [
                config.objective.training_flops(
                    grid, [(mask.context, mask.target) for mask in kept]
                )
                for kept in drawn
            ]
        )
    )


def sample_kept_tokens(config: RunConfig, stage_index: int) -> list[list[KeptTokens]]:
    """What each mask keeps, in evenly spread micro-batches of a stage; [micro-batch][mask].

    Raises:
        ConfigError: A mask does not fit the stage's grid.
    """
    stage = config.stages[stage_index]
    masks = config.masks if stage.masks is None else stage.masks
    grid = config.grid(stage.frames, stage.resolution)
    check_masks(masks, grid)
    first = total_steps(config.stages[:stage_index]) * config.global_batch
    num_micro_batches = stage.steps * config.global_batch // stage.micro_batch
    num_taken = min(num_micro_batches, _SAMPLED_MICRO_BATCHES)
    drawn = []
    for number in np.linspace(0, num_micro_batches - 1, num_taken, dtype=np.int64).tolist():
        start = first + number * stage.micro_batch
        positions = range(start, start + stage.micro_batch)
        drawn.append(
            [
                KeptTokens(context=mask.context_BK.shape[1], target=mask.target_BK.shape[1])
                for mask in sample_masks(masks, grid, config.seed, positions)
            ]
        )
    return drawn


def summarise(drawn: Sequence[Sequence[KeptTokens]]) -> tuple[MaskTokens, ...]:
    """Mean and largest numbers per mask."""
    return tuple(
        MaskTokens(
            context_mean=float(np.mean([kept.context for kept in mask])),
            target_mean=float(np.mean([kept.target for kept in mask])),
            context_max=max(kept.context for kept in mask),
            target_max=max(kept.target for kept in mask),
        )
        for mask in zip(*drawn, strict=True)
    )
