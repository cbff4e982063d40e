"""V-JEPA 2: a student sees part of a clip, a predictor guesses the teacher's features of the rest.

Targets (arXiv 2506.09985, section 2) are the teacher's outputs, normalised over
channels, without gradient; the loss is the mean L1 distance per mask, averaged over masks.

V-JEPA 1 is the same with other settings (`configs/vjepa1-vitl16.yaml`). V-JEPA 2.1 (arXiv
2603.14482, `configs/vjepa21-vitl16.yaml`) teaches several levels of the teacher at once, each
normalised by itself, and adds the distance at context tokens, by a weight that rises.
"""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.clip import ClipBatch, Grid, Losses, Progress
from pipeline.data.augment import normalise
from pipeline.models.cost import encoder_flops, predictor_flops
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.packing import PackedTokens, context_tokens, gather_packed, target_tokens
from pipeline.models.predictor import Predictor, PredictorConfig
from pipeline.objectives import base
from pipeline.objectives._dense import (
    ContextLoss,
    inverse_root_distance,
    mean_per_mask,
)
from pipeline.schedule import Ramp, linear
from pipeline.track.collapse import FEATURE_STD_HEALTHY

# Enough tokens of each clip to see the rank of the features, few enough to gather every time.
_FEATURES_PER_CLIP = 16
_TARGET_NORM_EPS = 1e-5
_DISTANCES = {"l1": functional.l1_loss, "smooth-l1": functional.smooth_l1_loss}


class Config(base.ObjectiveConfig):
    """Masked feature prediction with a moving-average teacher."""

    kind: Literal["jepa"] = "jepa"
    """Name of this objective."""
    encoder: EncoderConfig = EncoderConfig()
    """Student and teacher network."""
    predictor: PredictorConfig = PredictorConfig()
    """Network that guesses the target features from the context's."""
    momentum: Ramp = Ramp(start=0.99925, end=0.99925)
    """Momentum of the teacher's average, on a line over the whole run."""
    distance: Literal["l1", "smooth-l1"] = "l1"
    """Distance of a guess from its target: `l1` in all of V-JEPA, `smooth-l1` (square below 1) in
    I-JEPA."""
    context_loss: ContextLoss | None = None
    """Also learn to give back the features of the tokens that are seen, as V-JEPA 2.1 does."""

    @model_validator(mode="after")
    def _predictor_fits(self) -> Self:
        if self.predictor.predict_context != (self.context_loss is not None):
            raise ValueError(
                "predictor.predict_context and context_loss belong together: set "
                "predict_context: true where there is a context_loss, and only there"
            )
        return self

    def grid(self, frames: int, resolution: int) -> Grid:
        """Tokens of a clip of `frames` frames at `resolution` pixels."""
        return self.encoder.grid(frames, resolution)

    def training_flops(self, grid: Grid, kept: Sequence[tuple[float, float]]) -> float:
        """Model FLOPs of one clip: teacher forward; student and predictor forward and backward.

        A backward pass costs twice its forward, but that of the student's patch embedding only
        once: pixels need no gradient. Recomputed activations do not count.
        """
        total = encoder_flops(self.encoder, grid.num_tokens)
        # Tokens that two masks share are embedded once if there are more than in the clip.
        embedded = min(grid.num_tokens, sum(round(context) for context, _ in kept))
        total += 2.0 * encoder_flops(self.encoder, 0, embedded=embedded)
        width = self.encoder.dims.width
        for context, target in kept:
            student = encoder_flops(self.encoder, round(context), embedded=0)
            guess = predictor_flops(
                self.predictor, width, round(context), round(target), levels=self.num_levels
            )
            total += 3.0 * (student + guess)
        return total

    @property
    def num_levels(self) -> int:
        """Levels of the teacher that are learned."""
        return max(1, len(self.encoder.levels))


class Objective(base.Objective):
    """Student, predictor and teacher."""

    gates = (
        base.Gate(metric="health.effective_rank", healthy="up"),
        base.Gate(metric="health.feature_std", healthy="above", threshold=FEATURE_STD_HEALTHY),
    )

    def __init__(self, config: Config, options: base.BuildOptions) -> None:
        self.config = config
        attention, recompute = options.attention, options.checkpoint_activations
        self._student = Encoder(
            config.encoder, attention=attention, checkpoint_activations=recompute
        )
        self._predictor = Predictor(
            config.predictor,
            encoder_width=config.encoder.dims.width,
            levels=config.num_levels,
            attention=attention,
            checkpoint_activations=recompute,
        )
        # Its own weights never count: the average starts as a copy of the student.
        self._teacher = Encoder(config.encoder, attention=attention).requires_grad_(False)
        self._modules = nn.ModuleDict(
            {"encoder": self._student, "predictor": self._predictor, "teacher": self._teacher}
        )

    def modules(self) -> nn.ModuleDict:
        """The student `encoder`, the `predictor` and the frozen `teacher`."""
        return self._modules

    def averaged_pairs(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """The teacher averages the student."""
        return ((self._student, self._teacher),)

    def loss(self, batch: ClipBatch, progress: Progress) -> Losses:
        """Mean over masks of the mean distance of guess and target, each mask of equal weight.

        Within a mask every clip weighs equally: its own mean over target tokens and channels is
        taken first. Where all clips keep equally many tokens that is the reference's plain mean;
        where they do not, it makes the loss of a global batch the same however it is cut into
        micro-batches and spread over ranks. The context loss, if there is one, is such a mean as
        well, and is added times its weight at this step.
        """
        video_BCTHW = normalise(batch.video_BCTHW).to(self._compute_dtype())
        with torch.no_grad():
            target_BND = self._teacher(video_BCTHW, levels=True)
        context_PD = self._student(video_BCTHW, batch.masks, levels=True)
        guesses = self._predictor(context_PD, batch.masks, batch.grid)
        guess_PD, *again = guesses if isinstance(guesses, tuple) else (guesses,)
        tokens = target_tokens(batch.masks)
        losses = mean_per_mask(self._errors(guess_PD, target_BND, tokens), tokens)
        terms = {f"loss_mask_{number}": loss for number, loss in enumerate(losses)}
        total = torch.stack(losses).mean()
        if self.config.context_loss is not None:
            context = context_tokens(batch.masks)
            error_P = self._errors(again[0], target_BND, context)
            error_P = error_P * inverse_root_distance(
                context, tokens, batch.grid, scale=self.config.context_loss.scale_distance
            )
            terms["loss_context"] = torch.stack(mean_per_mask(error_P, context)).mean()
            total = total + self.config.context_loss.at(progress.step) * terms["loss_context"]
        return Losses(total=total, terms=terms, features_ND=self._sample(target_BND))

    def after_step(self, progress: Progress) -> dict[str, float]:
        """Moves the teacher toward the student."""
        momentum = linear(self.config.momentum, progress.step, progress.total_steps)
        for average in self.averages:
            average.update(momentum)
        return {"momentum": momentum}

    def encoder(self) -> nn.Module:
        """The teacher, which evaluations use."""
        return self._teacher

    def _compute_dtype(self) -> torch.dtype:
        return self._predictor.mask_tokens.dtype

    def _errors(self, guess_PD: Tensor, target_BND: Tensor, tokens: PackedTokens) -> Tensor:
        """Distance [P] of each token's guess from its target, a mean over channels."""
        # Only what is asked for is normalised, and so takes the room of float32.
        with torch.no_grad():
            wanted_PD = self._normalised(gather_packed(target_BND, tokens))
        measure = _DISTANCES[self.config.distance]
        return measure(guess_PD.float(), wanted_PD, reduction="none").mean(dim=-1)

    @torch.no_grad()
    def _normalised(self, features: Tensor) -> Tensor:
        """Features [..., levels · D] in float32, each level normalised over its channels."""
        levels = features.float().unflatten(-1, (self.config.num_levels, -1))
        return functional.layer_norm(levels, levels.shape[-1:], eps=_TARGET_NORM_EPS).flatten(-2)

    def _sample(self, target_BND: Tensor) -> Tensor:
        """Targets of the last level at evenly spread tokens of each clip."""
        num_tokens = target_BND.shape[1]
        count, device = min(num_tokens, _FEATURES_PER_CLIP), target_BND.device
        # Made on the device: a copy from the host would wait for it in every step.
        places = torch.linspace(0, num_tokens - 1, count, device=device).round().long()
        some_BKD = target_BND[:, places]
        return self._normalised(some_BKD)[..., -self.config.encoder.dims.width :].flatten(0, 1)
