"""V-JEPA 2: a student sees part of a clip, a predictor guesses the teacher's features of the rest.

Targets (arXiv 2506.09985, section 2) are the teacher's outputs, normalised over
channels, without gradient; the loss is the mean L1 distance per mask, averaged over masks.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.clip import ClipBatch, Grid, Losses, Progress
from pipeline.data.augment import normalise
from pipeline.models.cost import encoder_flops, predictor_flops
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.layers import gather_tokens
from pipeline.models.predictor import Predictor, PredictorConfig
from pipeline.objectives import base
from pipeline.schedule import Ramp, linear
from pipeline.track.collapse import FEATURE_STD_HEALTHY

# Enough tokens of each clip to see the rank of the features, few enough to gather every time.
_FEATURES_PER_CLIP = 16
_TARGET_NORM_EPS = 1e-5


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

    def grid(self, frames: int, resolution: int) -> Grid:
        """Tokens of a clip of `frames` frames at `resolution` pixels."""
        return self.encoder.grid(frames, resolution)

    def training_flops(self, grid: Grid, kept: Sequence[tuple[float, float]]) -> float:
        """Model FLOPs of one clip: teacher forward; student and predictor forward and backward.

        A backward pass costs twice its forward. Recomputed activations do not count.
        """
        total = encoder_flops(self.encoder, grid.num_tokens)
        for context, target in kept:
            student = encoder_flops(self.encoder, round(context), embedded=grid.num_tokens)
            width = self.encoder.dims.width
            guess = predictor_flops(self.predictor, width, round(context), round(target))
            total += 3.0 * (student + guess)
        return total


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

    def loss(self, batch: ClipBatch, progress: Progress) -> Losses:  # noqa: ARG002
        """Mean over masks of mean |prediction − target|, each mask of equal weight."""
        video_BCTHW = normalise(batch.video_BCTHW).to(self._compute_dtype())
        with torch.no_grad():
            target_BND = self._targets(video_BCTHW)
        terms = {}
        for number, mask in enumerate(batch.masks):
            context_BKD = self._student(video_BCTHW, mask.context_BK)
            guess_BKD = self._predictor(context_BKD, mask, batch.grid)
            wanted_BKD = gather_tokens(target_BND, mask.target_BK)
            terms[f"loss_mask_{number}"] = functional.l1_loss(guess_BKD.float(), wanted_BKD)
        total = torch.stack(list(terms.values())).mean()
        return Losses(total=total, terms=terms, features_ND=_sample_tokens(target_BND))

    def after_step(self, progress: Progress) -> dict[str, float]:
        """Moves the teacher toward the student."""
        momentum = linear(self.config.momentum, progress.step, progress.total_steps)
        for average in self.averages:
            average.update(momentum)
        return {"momentum": momentum}

    def encoder(self) -> nn.Module:
        """The teacher, which evaluations use."""
        return self._teacher

    def _targets(self, video_BCTHW: Tensor) -> Tensor:
        features_BND = self._teacher(video_BCTHW).float()
        width = (features_BND.shape[-1],)
        return functional.layer_norm(features_BND, width, eps=_TARGET_NORM_EPS)

    def _compute_dtype(self) -> torch.dtype:
        return self._predictor.mask_tokens.dtype


def _sample_tokens(features_BND: Tensor) -> Tensor:
    num_tokens = features_BND.shape[1]
    places = torch.linspace(0, num_tokens - 1, min(num_tokens, _FEATURES_PER_CLIP)).round().long()
    return features_BND[:, places.to(features_BND.device)].detach().flatten(0, 1)
