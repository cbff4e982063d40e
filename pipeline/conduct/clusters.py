"""Clusters of clips, and how often each clip is to be seen: arithmetic on features.

The curated set of V-JEPA 2 was made this way (paper, appendix on data): clips that look alike
form a cluster; clips of datasets one would like to have more of are sorted into the same clusters;
a cluster is drawn as often as those datasets fall into it, and one that none falls into never.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import MiniBatchKMeans

NO_CLUSTER = -1
"""Stands for: a clip without features, because it could not be decoded."""
_BATCH = 4096
_PASSES = 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clusters:
    """Centres of clusters, float32 [K, D]; those that no clip fell into are left out."""

    centres: np.ndarray

    def nearest(self, features_ND: np.ndarray) -> np.ndarray:
        """Number of each clip's cluster, int64 [N]; `NO_CLUSTER` for rows that are not finite."""
        good = np.atleast_1d(np.isfinite(features_ND).all(axis=1))
        labels = np.full(len(features_ND), NO_CLUSTER, dtype=np.int64)
        for first in range(0, len(features_ND), _BATCH):
            rows = np.flatnonzero(good[first : first + _BATCH]) + first
            labels[rows] = self.distances(features_ND[rows]).argmin(axis=1)
        return labels

    def distances(self, features_ND: np.ndarray) -> np.ndarray:
        """Squared distance of clips and centres, up to a number of each clip's own; [N, K]."""
        return (self.centres**2).sum(axis=1) - 2 * features_ND @ self.centres.T


def find_clusters(features_ND: np.ndarray, num_clusters: int, seed: int) -> Clusters:
    """K-means on features of length one; the same features and seed give the same clusters.

    Args:
        features_ND: Finite features of at least `num_clusters` clips.
        num_clusters: How many to look for.
        seed: Of the first centres and of the batches.
    """
    found = MiniBatchKMeans(
        num_clusters,
        random_state=seed,
        batch_size=max(_BATCH, num_clusters),
        max_iter=_PASSES,
        n_init=3,  # pyright: ignore[reportArgumentType] - its stub is read off a default
        init_size=max(_BATCH, 3 * num_clusters),
    ).fit(features_ND)
    everything = Clusters(centres=np.asarray(found.cluster_centers_, dtype=np.float32))
    used = np.unique(everything.nearest(features_ND))
    return Clusters(centres=everything.centres[used])


def cluster_weights(
    own: np.ndarray, targets: Sequence[tuple[float, np.ndarray]]
) -> np.ndarray:  # [K]
    """How much of what is drawn comes from each cluster, float64 [K], together 1.

    Σ_d w_d · N_dc / N_d over the target datasets d (vjepa2 paper); without any, every cluster in
    which there is a clip counts the same. Clusters without a clip of the curated dataset get
    nothing, and the rest is scaled up.

    Args:
        own: Clips of the curated dataset in each cluster, [K].
        targets: Weight of each target dataset and its clips in each cluster, [K].
    """
    wanted = np.zeros(len(own))
    for weight, counts in targets:
        wanted += weight * counts / max(counts.sum(), 1)
    wanted = np.where(own > 0, wanted if targets else 1.0, 0.0)
    total = wanted.sum()
    return wanted / total if total > 0 else wanted


def sample_weights(labels: np.ndarray, weights_K: np.ndarray) -> np.ndarray:  # [N]
    """Weight of each clip: its cluster's, shared equally; float32 [N] with a mean of 1.

    Args:
        labels: Number of each clip's cluster; clips without one get 0.
        weights_K: Of `cluster_weights`.
    """
    counts = count(labels, len(weights_K))
    shares = weights_K / np.maximum(counts, 1)
    weights = np.where(labels == NO_CLUSTER, 0.0, shares[labels])
    return (weights * len(labels)).astype(np.float32)


def count(labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """Clips in each cluster, int64 [K]."""
    return np.bincount(labels[labels != NO_CLUSTER], minlength=num_clusters)


def some_rows(parts: Iterable[np.ndarray], num_rows: int, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of all finite rows, drawn evenly, in their order.

    Args:
        parts: Features in parts, so that never all of them lie in memory.
        num_rows: Rows of all parts together.
        limit: How many to keep.
        seed: Of the draw.
    """
    kept = np.ones(num_rows, dtype=bool)
    if num_rows > limit:
        kept[:] = False
        kept[np.random.default_rng(seed).choice(num_rows, limit, replace=False)] = True
    chosen, first = [], 0
    for part in parts:
        rows = part[kept[first : first + len(part)]]
        chosen.append(rows[np.isfinite(rows).all(axis=1)])
        first += len(part)
    return np.concatenate(chosen) if chosen else np.empty((0, 0), np.float32)
