"""Feature maps: what an encoder tells apart in a clip, as colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.clip import Clip, Grid
from pipeline.data.augment import normalise

# Three components become red, green and blue; beyond these shares colours are clipped, so that
# one odd token does not take the contrast of all others.
_LOW, _HIGH = 0.02, 0.98
_MAX_FRAME_PIXELS = 112
_MAX_TIMES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMapRow:
    """One clip, and what each encoder makes of it at the same moments."""

    key: str
    frames_THWC: np.ndarray
    """uint8 RGB: the first frame of each tubelet, scaled down."""
    maps: Mapping[str, np.ndarray]
    """Encoder's name → uint8 [T, h, w, 3], one pixel per token."""


def feature_map_rows(
    encoders: Mapping[str, nn.Module], clips: Sequence[Clip], grid: Grid
) -> list[FeatureMapRow]:
    """The three main directions of each clip's patch features as RGB, for every encoder.

    The directions are found per clip over all its tokens, so colours compare within a clip, across
    space and time, and not between clips or encoders.

    Args:
        encoders: Name and encoder; each maps normalised [1, 3, T, H, W] to [1, N, D].
        clips: Clips of one size.
        grid: Tokens of such a clip.
    """
    return [_row(encoders, clip, grid) for clip in clips]


def principal_colours(features_ND: Tensor, grid: Grid) -> np.ndarray:
    """Projects tokens on their first three principal components and stretches those to 0…255.

    Args:
        features_ND: Features of one clip's tokens.
        grid: Their places: N = t · h · w.

    Returns:
        uint8 [t, h, w, 3]; grey where the features do not differ at all.
    """
    centred_ND = features_ND.float() - features_ND.float().mean(dim=0)
    _, singular, directions_KD = torch.linalg.svd(centred_ND, full_matrices=False)
    directions_KD = directions_KD[:3]
    # A component's sign is arbitrary: make its largest entry positive, so pictures are repeatable.
    largest_K1 = directions_KD.abs().argmax(dim=1, keepdim=True)
    directions_KD = directions_KD * directions_KD.gather(1, largest_K1).sign()
    colours_NK = centred_ND @ directions_KD.T
    # A direction without any variance would stretch rounding noise to full colour.
    colours_NK[:, singular[: colours_NK.shape[1]] <= 1e-5 * centred_ND.shape[0] ** 0.5] = 0.0
    low, high = colours_NK.quantile(_LOW, dim=0), colours_NK.quantile(_HIGH, dim=0)
    flat = high - low <= 0
    unit_NK = (colours_NK - low) / torch.where(flat, torch.ones_like(low), high - low)
    unit_NK = torch.where(flat, torch.full_like(unit_NK, 0.5), unit_NK)
    rgb_N3 = torch.full((len(unit_NK), 3), 0.5)
    rgb_N3[:, : unit_NK.shape[1]] = unit_NK.clamp(0, 1)
    rgb_thwc = rgb_N3.reshape(grid.t, grid.h, grid.w, 3)
    return (255 * rgb_thwc).round().to(torch.uint8).numpy()


def _row(encoders: Mapping[str, nn.Module], clip: Clip, grid: Grid) -> FeatureMapRow:
    times = np.unique(np.linspace(0, grid.t - 1, min(grid.t, _MAX_TIMES)).round().astype(int))
    video_BCTHW = normalise(clip.video_CTHW[None])
    maps = {}
    for name, encoder in encoders.items():
        with torch.inference_mode():
            features_BND = encoder(video_BCTHW)
        maps[name] = principal_colours(features_BND[0], grid)[times]
    frames_per_token = clip.video_CTHW.shape[1] // grid.t
    frames_CTHW = clip.video_CTHW[:, times * frames_per_token]
    return FeatureMapRow(key=clip.key, frames_THWC=_small(frames_CTHW), maps=maps)


def _small(frames_CTHW: Tensor) -> np.ndarray:
    frames_TCHW = frames_CTHW.transpose(0, 1).float()
    # Small clips stay as they are; their strips are enlarged by the page.
    size = min(_MAX_FRAME_PIXELS, frames_TCHW.shape[-1])
    small_TCHW = interpolate(frames_TCHW, (size, size), mode="bilinear", antialias=True)
    return small_TCHW.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
