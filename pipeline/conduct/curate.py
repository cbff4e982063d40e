"""Curation by embedding: which clips of a finished dataset are to be seen how often.

Features of an encoder for every sample, clusters of them, weights of the clusters, `weights.npy`
beside the index. Everything but the weights and the pictures of them is kept in the hidden folder
`.curate` of the dataset, so a run that was stopped goes on, and another number of clusters costs
no further pass over the videos.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.cluster import local_ray
from pipeline.conduct.clusters import (
    NO_CLUSTER,
    Clusters,
    cluster_weights,
    count,
    find_clusters,
    sample_weights,
    some_rows,
)
from pipeline.conduct.embedding import ClipSize, ShardJob, embed_shard, feature_path, middle_picture
from pipeline.conduct.pool import Pool
from pipeline.conduct.tasks import TaskNeeds
from pipeline.data.format import BadMediaError, ShardIndex
from pipeline.data.manifest import write_durably
from pipeline.data.weights import write_weights
from pipeline.errors import DataError, UsageError
from pipeline.exchange import load_encoder
from pipeline.probe.frozen import encoder_digest
from pipeline.report.clusters import ClusterRow, draw_clusters

CLUSTERS_NAME = "clusters.json"
PICTURE_NAME = "clusters.png"
# Clips on which clusters are found; more change them little and take memory.
_MAX_FITTED = 1 << 18
_SHOWN_CLUSTERS, _SHOWN_CLIPS = 16, 8
_WAIT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A dataset whose like one would like to see more of."""

    path: Path
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateSettings:
    """How clips are embedded and clustered."""

    encoder: Path
    clusters: int
    clip: ClipSize
    which: Literal["teacher", "student"] = "teacher"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateReport:
    """What a curation came to."""

    dataset: str
    num_samples: int
    num_undecodable: int
    """Samples without features; their weight is 0."""
    num_clusters: int
    num_clusters_drawn: int
    """Clusters of which anything is drawn."""
    num_samples_drawn: int
    effective_samples: float
    """(Σw)² / Σw²: as many equally weighted samples vary as much."""
    num_embedded_shards: int
    """Shards whose features were not there already."""
    weights_sha256: str
    picture: str


def curate(
    dataset: Path,
    settings: CurateSettings,
    targets: Sequence[Target] = (),
    *,
    address: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CurateReport:
    """Gives a dataset sampling weights by the clusters of its clips.

    Args:
        dataset: A finished dataset, which must be writable.
        settings: How.
        targets: Datasets to resemble; without any, all clusters are drawn equally often.
        address: A Ray cluster to join.
        on_progress: Called with the shards embedded and all shards.

    Raises:
        UsageError: A dataset or the encoder is missing, or there are more clusters than clips.
        DataError: No clip can be decoded, or no target falls into a cluster.
        StorageError: The dataset's folder cannot be written.
    """
    encoder = load_encoder(settings.encoder, which=settings.which)
    encoder.config.grid(settings.clip.frames, settings.clip.resolution)
    sets = [_Embedded(path, dataset, settings) for path in (dataset, *(t.path for t in targets))]
    _check_number(settings.clusters, len(sets[0].index))
    digest = encoder_digest(encoder)
    del encoder
    embedded = _embed_missing(sets, digest, address, on_progress)
    clusters = _found_clusters(sets[0], digest, settings)
    labels = [np.concatenate([clusters.nearest(f) for f in one.features(digest)]) for one in sets]
    counts = [count(one, len(clusters.centres)) for one in labels]
    pairs = [(t.weight, n) for t, n in zip(targets, counts[1:], strict=True)]
    weights_K = cluster_weights(counts[0], pairs)
    if not weights_K.any():
        raise DataError("no clip of the target datasets could be decoded")
    weights = sample_weights(labels[0], weights_K)
    rows = _rows(sets[0], clusters, labels[0], weights_K, digest)
    draw_clusters(rows, dataset / PICTURE_NAME)
    _write_clusters(dataset, settings, targets, digest, counts, weights_K)
    # Last: what the loader believes is there once everything is.
    sha256 = write_weights(dataset, weights)
    return CurateReport(
        dataset=str(dataset),
        num_samples=len(weights),
        num_undecodable=int((labels[0] == NO_CLUSTER).sum()),
        num_clusters=len(weights_K),
        num_clusters_drawn=int((weights_K > 0).sum()),
        num_samples_drawn=int((weights > 0).sum()),
        effective_samples=round(float(weights.sum() ** 2 / (weights**2).sum()), 1),
        num_embedded_shards=embedded,
        weights_sha256=sha256,
        picture=str(dataset / PICTURE_NAME),
    )


class _Embedded:
    """A dataset and where its features lie: all beside the dataset that is curated."""

    def __init__(self, path: Path, keeper: Path, settings: CurateSettings) -> None:
        self.index = ShardIndex.open(path)
        self._keeper, self._settings = keeper, settings

    def path(self, shard: int, digest: str) -> Path:
        entry = self.index.manifest.shards[shard]
        return feature_path(self._keeper, entry.sha256, digest, self._settings.clip)

    def jobs(self, digest: str) -> Iterator[ShardJob]:
        for shard in range(len(self.index.manifest.shards)):
            yield ShardJob(
                dataset=str(self.index.path),
                shard=shard,
                encoder=str(self._settings.encoder),
                which=self._settings.which,
                clip=self._settings.clip,
                result=str(self.path(shard, digest)),
            )

    def features(self, digest: str) -> Iterator[np.ndarray]:
        """Of all samples in the order of the index, a shard at a time."""
        for shard in range(len(self.index.manifest.shards)):
            yield np.load(self.path(shard, digest), allow_pickle=False)


def _embed_missing(
    sets: Sequence[_Embedded],
    digest: str,
    address: str | None,
    on_progress: Callable[[int, int], None] | None,
) -> int:
    jobs = {job.result: job for one in sets for job in one.jobs(digest)}
    missing = [job for result, job in jobs.items() if not Path(result).is_file()]
    if not missing:
        return 0
    Path(missing[0].result).parent.mkdir(parents=True, exist_ok=True)
    show = on_progress or _nobody
    show(len(jobs) - len(missing), len(jobs))
    with local_ray(address=address) as ray:
        resources = ray.cluster_resources()
        num_gpus = 1.0 if resources.get("GPU", 0) >= 1 else 0.0
        limit = max(1, int(resources.get("GPU" if num_gpus else "CPU", 1)))
        pool = Pool(ray, nice=0)
        try:
            _run(pool, missing, limit, num_gpus, lambda left: show(len(jobs) - left, len(jobs)))
        finally:
            pool.cancel()
    return len(missing)


def _run(
    pool: Pool,
    jobs: Sequence[ShardJob],
    limit: int,
    num_gpus: float,
    show: Callable[[int], None],
) -> None:
    """All jobs, as many at a time as there are devices; the first error ends it."""
    waiting = list(reversed(jobs))
    while waiting or len(pool):
        while waiting and len(pool) < limit:
            job = waiting.pop()
            what = f"embedding shard {job.shard} of {job.dataset}"
            needs = TaskNeeds(num_cpus=1, num_gpus=num_gpus, describe=what)
            pool.submit(job.result, embed_shard, job, needs=needs)
        for ended in pool.ended(_WAIT_SECONDS):
            if ended.error is not None:
                raise ended.error
            show(len(waiting) + len(pool))


def _found_clusters(own: _Embedded, digest: str, settings: CurateSettings) -> Clusters:
    rows = some_rows(own.features(digest), len(own.index), _MAX_FITTED, settings.seed)
    _check_number(settings.clusters, len(rows))
    return find_clusters(rows, settings.clusters, settings.seed)


def _check_number(num_clusters: int, num_clips: int) -> None:
    """Before the videos are decoded, and again with what could be."""
    if num_clips < num_clusters:
        raise UsageError(
            f"{num_clusters} clusters of {num_clips} clips that can be decoded",
            remedy="Ask for fewer with --clusters; a cluster of 100 clips or more is usual.",
        )


def _rows(
    own: _Embedded, clusters: Clusters, labels: np.ndarray, weights_K: np.ndarray, digest: str
) -> list[ClusterRow]:
    """The clusters that are drawn most, with the clips nearest to their centres."""
    shown = np.argsort(-weights_K, kind="stable")[:_SHOWN_CLUSTERS]
    distances = np.concatenate([clusters.distances(f)[:, shown] for f in own.features(digest)])
    rows = []
    for column, cluster in enumerate(shown.tolist()):
        members = np.flatnonzero(labels == cluster)
        order = distances[members, column].argsort(kind="stable")
        nearest = members[order[:_SHOWN_CLIPS]].tolist()
        label = (
            f"cluster {cluster}: {len(members)} clips, {weights_K[cluster]:.1%} of what is drawn"
        )
        rows.append(ClusterRow(label=label, pictures=_pictures(own.index, nearest)))
    return rows


def _pictures(index: ShardIndex, samples: Sequence[int]) -> tuple[np.ndarray, ...]:
    pictures = []
    for sample in samples:
        try:
            pictures.append(middle_picture(index, sample))
        except BadMediaError:
            continue
    return tuple(pictures)


def _write_clusters(
    dataset: Path,
    settings: CurateSettings,
    targets: Sequence[Target],
    digest: str,
    counts: Sequence[np.ndarray],
    weights_K: np.ndarray,
) -> None:
    content: dict[str, Any] = {
        "encoder": str(settings.encoder),
        "encoder_digest": digest,
        "which": settings.which,
        "clip": asdict(settings.clip),
        "seed": settings.seed,
        "toward": [{"path": str(t.path), "weight": t.weight} for t in targets],
        "clips": counts[0].tolist(),
        "target_clips": [one.tolist() for one in counts[1:]],
        "weights": [round(float(weight), 9) for weight in weights_K],
    }
    write_durably(dataset / CLUSTERS_NAME, json.dumps(content, indent=1).encode() + b"\n")


def _nobody(_done: int, _total: int) -> None:
    """Where nobody watches."""
