"""Samples drawn in proportion to a dataset's weights, wherever and by whomever."""

import pickle
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import SHIPPED_CONFIGS, load_config
from pipeline.data.clips import make_order, open_sources
from pipeline.data.cursor import check_same, data_identity
from pipeline.data.format import ShardIndex
from pipeline.data.loader import make_loader
from pipeline.data.manifest import read_manifest
from pipeline.data.order import OrderSpec, clip_ref
from pipeline.data.settings import DataConfig, Source
from pipeline.data.weights import WeightTable, write_weights
from pipeline.errors import CheckpointError, DataError, UsageError
from pipeline.masks.collate import collate_plan
from pipeline.run import RunConfig
from tests.shards import make_plans, write_dataset

WEIGHTS = [3.0, 0.0, 1.0, 0.5, 0.0, 1.5]


@pytest.fixture
def weighted(tmp_path: Path) -> Path:
    folder = write_dataset(tmp_path / "set", len(WEIGHTS))
    write_weights(folder, WEIGHTS)
    return folder


def table(folder: Path, weights: np.ndarray) -> WeightTable:
    path = folder / "weights.npy"
    np.save(path, weights.astype("<f4"))
    return WeightTable(path, len(weights))


def counts_of(order: OrderSpec, epoch: int) -> np.ndarray:
    size = order.sizes[0]
    refs = [clip_ref(order, position) for position in range(epoch * size, (epoch + 1) * size)]
    return np.bincount([ref.sample for ref in refs], minlength=size)


def test_every_epoch_has_each_sample_in_its_proportion_to_one_clip(tmp_path):
    weights = np.random.default_rng(0).exponential(size=3000) ** 2
    weights[1024:2048] = 0
    order = OrderSpec(seed=3, sizes=(3000,), weights=(1.0,), tables=(table(tmp_path, weights),))
    wanted = 3000 * weights / weights.sum()
    total = np.zeros(3000)
    for epoch in range(4):
        counts = counts_of(order, epoch)
        assert (np.abs(counts - wanted) < 1 + 1e-3).all()
        total += counts
    # Rounding evens out over epochs: one clip in four epochs, not one in each.
    assert np.abs(total - 4 * wanted).max() < 2
    assert total[1024:2048].sum() == 0


@given(
    weights=st.lists(
        st.one_of(st.just(0.0), st.floats(2**-20, 2**20, width=32)), min_size=1
    ).filter(any),
    share=st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_a_share_falls_on_a_sample_that_has_weight(tmp_path_factory, weights, share):
    array = np.array(weights, dtype=np.float64)
    found = table(tmp_path_factory.mktemp("w"), array)
    for one in (share, 0.0, 1.0):
        assert array[found.sample_at(one)] > 0


def test_a_share_falls_where_the_cumulative_weight_says(tmp_path):
    weights = np.random.default_rng(1).random(5000).astype(np.float32).astype(np.float64)
    found = pickle.loads(pickle.dumps(table(tmp_path, weights)))  # noqa: S301 - our own
    ends = np.cumsum(weights) / weights.sum()
    for share in np.random.default_rng(2).random(200):
        assert found.sample_at(float(share)) == np.searchsorted(ends, share, side="right")


def test_what_stands_at_a_position_does_not_depend_on_what_was_asked_before(tmp_path):
    weights = np.random.default_rng(1).random(100)
    tables = (table(tmp_path, weights), None)
    order = OrderSpec(seed=1, sizes=(100, 30), weights=(0.7, 0.3), tables=tables)
    late = clip_ref(order, 10**12)
    forward = [clip_ref(order, position) for position in range(300)]
    assert [clip_ref(order, position) for position in reversed(range(300))] == forward[::-1]
    assert clip_ref(order, 10**12) == late
    assert {ref.source for ref in forward} == {0, 1}


def test_a_substitute_has_weight_and_is_another_sample(tmp_path):
    order = OrderSpec(
        seed=1, sizes=(6,), weights=(1.0,), tables=(table(tmp_path, np.array(WEIGHTS)),)
    )
    for position in range(30):
        first = clip_ref(order, position).sample
        for attempt in range(1, 5):
            other = clip_ref(order, position, attempt).sample
            assert other != first
            assert WEIGHTS[other] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_of_any_world_size_draw_by_weight_and_alike(weighted, workers):
    config = DataConfig(sources=(Source(path=str(weighted)),), workers=workers)
    keys = {}
    for world_size in (1, 2) if workers == 0 else (1,):
        for rank in range(world_size):
            plans = make_plans(rank=rank, world_size=world_size)
            collate = partial(collate_plan, seed=5)
            with make_loader(config, plans=plans, collate=collate, seed=5) as loader:
                for plan, batch in zip(plans, loader, strict=True):
                    for position, key in zip(plan.positions, batch.keys, strict=True):
                        assert keys.setdefault(position, key) == key
    order = make_order(config, open_sources(config), seed=5)
    index = ShardIndex.open(weighted)
    assert keys == {p: index.record(clip_ref(order, p).sample).key for p in keys}
    drawn = Counter(keys.values())
    assert drawn[index.record(0).key] == 3 * len(keys) // 6
    assert set(drawn) == {index.record(n).key for n, w in enumerate(WEIGHTS) if w}


def test_weights_can_be_left_out_of_account(weighted):
    config = DataConfig(sources=(Source(path=str(weighted), sample_weights=False),), workers=0)
    order = make_order(config, open_sources(config), seed=5)
    assert set(counts_of(order, 0).tolist()) == {1}


def test_a_resume_is_refused_when_weights_change(weighted):
    def identity(**settings):
        config = DataConfig(sources=(Source(path=str(weighted), **settings),))
        return data_identity(config, open_sources(config), seed=1, global_batch=8)

    saved = identity()
    assert check_same(saved, identity()) == ()
    with pytest.raises(
        CheckpointError, match=r"were drawn by the weights \w+, are drawn all alike"
    ):
        check_same(saved, identity(sample_weights=False))
    write_weights(weighted, [1.0] * len(WEIGHTS))
    with pytest.raises(CheckpointError, match="are drawn by the weights"):
        check_same(saved, identity())


def test_damaged_missing_or_wrong_weights_are_named(weighted):
    path = weighted / "weights.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"weights\.npy: its SHA-256 differs"):
        ShardIndex.open(weighted)
    for wrong, words in (([1.0], "expected 6 weights"), (np.ones((1, 6)), "expected 6 weights")):
        with pytest.raises(UsageError, match=words):
            write_weights(weighted, wrong)
    for wrong, words in (
        ([0.0] * 6, "all weights are 0"),
        ([1, 1, -1, 1, 1, 1], "sample 2 has -1"),
        ([1, np.nan, 1, 1, 1, 1], "sample 1 has nan"),
    ):
        with pytest.raises(DataError, match=words):
            write_weights(weighted, wrong)
    assert read_manifest(weighted).weights_sha256 is not None


def test_the_shipped_mixture_deals_the_proportions_of_the_paper():
    run = load_config(SHIPPED_CONFIGS / "vitl16-videomix22m.yaml", RunConfig).config
    weights = tuple(source.weight for source in run.data.sources)
    assert weights == (0.056, 0.188, 0.318, 0.188, 0.250)
    order = OrderSpec(seed=run.seed, sizes=(10, 20, 30, 40, 50), weights=weights)
    counts = Counter(clip_ref(order, position).source for position in range(5000, 6000))
    assert counts == {0: 56, 1: 188, 2: 318, 3: 188, 4: 250}
