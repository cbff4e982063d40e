import json
from pathlib import Path

import pytest

from pipeline.data.clips import open_sources
from pipeline.data.cursor import DataIdentity, check_same, data_identity
from pipeline.data.settings import DataConfig, Source
from pipeline.errors import CheckpointError
from tests.shards import write_dataset


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    return {
        "a": write_dataset(root / "a", 3),
        "b": write_dataset(root / "b", 2, first_seed=50),
        "c": write_dataset(root / "c", 2, first_seed=60),
    }


def identity(folders, names: str = "ab", *, seed: int = 1, batch: int = 8, **settings):
    weights = settings.pop("weights", [0.5] * len(names))
    sources = [
        Source(path=str(folders[name]), weight=weight)
        for name, weight in zip(names, weights, strict=True)
    ]
    config = DataConfig(sources=tuple(sources), **settings)
    return data_identity(config, open_sources(config), seed=seed, global_batch=batch)


def test_an_identity_survives_its_way_through_json(folders):
    saved = identity(folders, crop_scale=(0.5, 1.0))
    assert DataIdentity.from_dict(json.loads(json.dumps(saved.to_dict()))) == saved
    assert check_same(saved, identity(folders, crop_scale=(0.5, 1.0))) == ()


def test_a_dataset_may_move_and_workers_may_change(folders, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(folders["a"])
    saved = identity(folders, workers=2, prefetch=1)
    current = identity(folders | {"a": moved}, workers=7, max_bad_fraction=0.5)
    assert check_same(saved, current) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2}, "seed was 1, is 2"),
        ({"batch": 16}, "global_batch was 8, is 16"),
        ({"sampling": "reference"}, "sampling was time, is reference"),
        ({"horizontal_flip": 0.0}, "horizontal_flip was 0.5, is 0.0"),
        ({"mixture_block": 500}, "mixture_block was 1000, is 500"),
        ({"weights": [0.5, 0.25]}, "weight was 0.5, is 0.25"),
        ({"names": "ac"}, "source 1 .* its index has other samples"),
        ({"names": "bb"}, "source 0 .* had 3 samples, has 2"),
        ({"names": "a"}, "there were 2 sources, are 1"),
        ({"names": "ba"}, "the order of the sources changed"),
    ],
)
def test_every_difference_is_explained_and_refused_unless_allowed(folders, change, words):
    saved, current = identity(folders), identity(folders, **change)
    with pytest.raises(CheckpointError, match=words) as caught:
        check_same(saved, current)
    assert "start a new run" in caught.value.remedy
    assert len(check_same(saved, current, allow_dataset_change=True)) == 1


def test_other_bytes_behind_the_same_index_are_a_difference(folders):
    saved = identity(folders)
    data = saved.to_dict()
    data["sources"][0]["digest"] = "0" * 64
    with pytest.raises(CheckpointError, match="other bytes behind the same index"):
        check_same(DataIdentity.from_dict(data), saved)


def test_all_differences_are_told_at_once(folders):
    with pytest.raises(CheckpointError) as caught:
        check_same(identity(folders), identity(folders, seed=9, batch=4, antialias=True))
    assert str(caught.value).count("\n  - ") == 3


@pytest.mark.parametrize("damage", [{"seed": None}, {"unknown": 1}])
def test_a_description_of_another_version_is_refused(folders, damage):
    data = identity(folders).to_dict() | damage
    data = {name: value for name, value in data.items() if value is not None}
    with pytest.raises(CheckpointError, match="cannot be read"):
        DataIdentity.from_dict(data)
