"""Signals of collapse, measured on the features of a batch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Integral of the characteristic-function test: knots and range of the LeJEPA paper's code.
_SIGREG_KNOTS, _SIGREG_RANGE = 17, 3.0


def collapse_signals(features_ND: Tensor, *, num_clips: int) -> dict[str, float]:
    """Measures the features of a batch; cheap enough for every fiftieth step.

    Args:
        features_ND: Features of the same places of `num_clips` clips, one clip after the other:
            N = num_clips × places. Computed in fp32.
        num_clips: How many clips they come from.

    Returns:
        `feature_std`: standard deviation per dimension, averaged over dimensions; 0 at collapse.
        `effective_rank`: see `effective_rank`; 1 at collapse, at most min(N, D).
        `sigreg_gauge`: see `sigreg_gauge`; 0.40 at collapse to zero.
        And from two clips on `clip_cosine`: mean cosine similarity between the mean features of
        two clips; 1 at collapse. `between_clip_share`: variance between clips at the same place
        over the whole variance; 0 if features depend on the place alone.

    Raises:
        ValueError: If N is no multiple of `num_clips`.
    """
    if num_clips < 1 or features_ND.shape[0] % num_clips:
        raise ValueError(f"{features_ND.shape[0]} features do not come from {num_clips} clips")
    features_ND = features_ND.detach().float()
    signals = {
        "feature_std": float(features_ND.std(dim=0, correction=0).mean()),
        "effective_rank": effective_rank(features_ND),
        "sigreg_gauge": sigreg_gauge(features_ND),
    }
    if num_clips >= 2:
        features_BND = features_ND.unflatten(0, (num_clips, -1))
        signals["clip_cosine"] = _mean_cosine(features_BND.mean(dim=1))
        signals["between_clip_share"] = _between_clip_share(features_BND)
    return signals


def effective_rank(features_ND: Tensor) -> float:
    """RankMe (Garrido et al. 2023, equation 1): exp of the entropy of the singular values.

    Features are not centred: a common offset that swamps everything else is a collapse too.

    Returns:
        Between 1 and min(N, D); NaN if the features are not finite.
    """
    if not bool(torch.isfinite(features_ND).all()):
        return math.nan
    singular = torch.linalg.svdvals(features_ND.float())
    share = singular / singular.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()).clamp_min(1.0))


def sigreg_gauge(features_ND: Tensor, *, num_slices: int = 64, seed: int = 0) -> float:
    """SIGReg of the LeJEPA paper (arXiv 2511.08544) divided by N: distance from a unit Gaussian.

    (1/M) Σ_m ∫_{−3}^{3} |φ̂_m(t) − e^{−t²/2}|² e^{−t²/2} dt, where φ̂_m is the empirical
    characteristic function of the features along the m-th of M random unit vectors. Without the
    factor N it compares across batch sizes.

    Returns:
        1.0527 / N for N exact Gaussian vectors; 0.40223 if all features are zero.
    """
    features_ND = features_ND.float()
    generator = torch.Generator().manual_seed(seed)
    directions_DM = torch.randn(features_ND.shape[1], num_slices, generator=generator)
    directions_DM = normalize(directions_DM, dim=0).to(features_ND.device)
    # Knots on [0, 3] only: the integrand is even.
    knots = torch.linspace(0.0, _SIGREG_RANGE, _SIGREG_KNOTS, device=features_ND.device)
    angle_NMK = (features_ND @ directions_DM)[..., None] * knots
    gaussian_K = torch.exp(-(knots**2) / 2)
    real_MK = angle_NMK.cos().mean(dim=0) - gaussian_K
    imaginary_MK = angle_NMK.sin().mean(dim=0)
    integrand_MK = (real_MK**2 + imaginary_MK**2) * gaussian_K
    return float(2 * torch.trapezoid(integrand_MK, knots, dim=-1).mean())


def _mean_cosine(means_BD: Tensor) -> float:
    unit_BD = normalize(means_BD, dim=1)
    num_clips = means_BD.shape[0]
    # Σ_{i≠j} uᵢ·uⱼ = |Σ uᵢ|² − B
    total = float(unit_BD.sum(dim=0).square().sum()) - num_clips
    return total / (num_clips * (num_clips - 1))


def _between_clip_share(features_BND: Tensor) -> float:
    whole = features_BND.flatten(0, 1).var(dim=0, correction=0).mean()
    between = features_BND.var(dim=0, correction=1).mean()
    return min(1.0, float(between / whole.clamp_min(1e-12)))
