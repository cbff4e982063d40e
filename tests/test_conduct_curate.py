"""Weights by clusters: the arithmetic against the formula, and the verb on a real dataset."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster import local_ray
from pipeline.conduct.clusters import (
    NO_CLUSTER,
    cluster_weights,
    find_clusters,
    sample_weights,
    some_rows,
)
from pipeline.conduct.curate import CurateReport, CurateSettings, Target, curate
from pipeline.conduct.embedding import ClipSize
from pipeline.data.format import ShardIndex
from pipeline.errors import UsageError
from tests.exchange_data import FRAMES, RESOLUTION, write_hf
from tests.shards import write_dataset

CLIP = ClipSize(frames=FRAMES, fps=4.0, resolution=RESOLUTION)


def blobs(per_blob: int, seed: int) -> np.ndarray:
    """Three tight groups of features, one after the other."""
    generator = np.random.default_rng(seed)
    centres = np.eye(3, 8, dtype=np.float32)
    rows = np.repeat(centres, per_blob, axis=0)
    return rows + generator.normal(0, 0.02, rows.shape).astype(np.float32)


def test_clusters_are_the_groups_there_are_and_depend_on_the_seed_alone() -> None:
    features = blobs(40, seed=1)
    clusters = find_clusters(features, 3, seed=0)
    labels = clusters.nearest(features)
    assert [len(set(labels[first : first + 40])) for first in (0, 40, 80)] == [1, 1, 1]
    assert len(set(labels)) == 3
    np.testing.assert_array_equal(clusters.centres, find_clusters(features, 3, seed=0).centres)
    features[5] = np.nan
    assert clusters.nearest(features)[5] == NO_CLUSTER
    expected = ((features[:, None] - clusters.centres) ** 2).sum(axis=2)
    nearest = np.nan_to_num(expected, nan=9).argmin(axis=1)
    np.testing.assert_array_equal(np.delete(clusters.nearest(features), 5), np.delete(nearest, 5))


def test_weights_of_clusters_follow_the_papers_formula() -> None:
    own = np.array([10, 30, 60, 0])
    first, second = np.array([8, 2, 0, 0]), np.array([0, 25, 0, 25])
    # 0.7 · 8/10, 0.7 · 2/10 + 0.3 · 25/50, nothing, and what has no clip goes to the others.
    raw = np.array([0.56, 0.14 + 0.15, 0.0, 0.0])
    got = cluster_weights(own, [(0.7, first), (0.3, second)])
    np.testing.assert_allclose(got, raw / raw.sum())
    np.testing.assert_allclose(cluster_weights(own, []), [1 / 3, 1 / 3, 1 / 3, 0])


def test_a_clusters_weight_is_shared_by_its_clips() -> None:
    labels = np.array([0, 1, 1, NO_CLUSTER, 1, 0])
    weights = sample_weights(labels, np.array([0.25, 0.75]))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights / 6, [0.125, 0.25, 0.25, 0, 0.25, 0.125])


def test_a_draw_of_rows_keeps_their_order_and_leaves_out_what_is_missing() -> None:
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    rows[3] = np.nan
    everything = some_rows(iter([rows[:4], rows[4:]]), 10, 100, seed=0)
    np.testing.assert_array_equal(everything, np.delete(rows, 3, axis=0))
    some = some_rows(iter([rows[:4], rows[4:]]), 10, 5, seed=0)
    assert len(some) in (4, 5)
    assert (np.diff(some[:, 0]) > 0).all()


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CurateReport]]:
    """A dataset curated twice toward its own first clips; a shard's features lost in between."""
    folder = tmp_path_factory.mktemp("curated")
    own = write_dataset(folder / "own", 24)
    like = write_dataset(folder / "like", 4)
    settings = CurateSettings(
        encoder=write_hf(folder / "encoder"), clusters=6, clip=CLIP, which="student"
    )
    reports = []
    with local_ray(num_cpus=1):
        reports.append(curate(own, settings, [Target(path=like, weight=1.0)]))
        shutil.copy(own / "weights.npy", folder / "first.npy")
        sorted((own / ".curate").iterdir())[0].unlink()
        reports.append(curate(own, settings, [Target(path=like, weight=1.0)]))
        with pytest.raises(UsageError, match="100 clusters of 24 clips"):
            curate(own, CurateSettings(encoder=settings.encoder, clusters=100, clip=CLIP))
    return folder, reports


def test_clips_like_the_target_are_drawn_and_the_loader_reads_the_weights(
    curated: tuple[Path, list[CurateReport]],
) -> None:
    index = ShardIndex.open(curated[0] / "own")
    assert index.weights is not None
    weights = np.load(curated[0] / "own" / "weights.npy")
    assert (weights.dtype, weights.shape) == (np.dtype("<f4"), (24,))
    # The target's clips are copies of four of these, which fall into clusters that are drawn.
    copies = ShardIndex.open(curated[0] / "like").records["key"]
    assert (weights[np.isin(index.records["key"], copies)] > 0).all()
    report = curated[1][0]
    assert report.num_samples_drawn == (weights > 0).sum()
    assert report.num_clusters_drawn < report.num_clusters
    assert index.manifest.weights_sha256 == report.weights_sha256


def test_a_lost_shard_of_features_alone_is_made_again_with_the_same_result(
    curated: tuple[Path, list[CurateReport]],
) -> None:
    folder, (first, second) = curated
    assert (first.num_embedded_shards, second.num_embedded_shards) == (4, 1)
    assert (folder / "first.npy").read_bytes() == (folder / "own" / "weights.npy").read_bytes()


def test_clusters_are_shown_and_written_down(curated: tuple[Path, list[CurateReport]]) -> None:
    own = curated[0] / "own"
    known = json.loads((own / "clusters.json").read_text())
    assert sum(known["clips"]) == 24
    assert sum(known["target_clips"][0]) == 4
    assert sum(known["weights"]) == pytest.approx(1.0)
    assert (own / "clusters.png").stat().st_size > 20_000
