"""Damaged shards are counted against the index; nothing of them is lost without a word."""

import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from pipeline.data.format import ShardIndex
from pipeline.data.inspection import inspect_shards
from pipeline.data.layout import INDEX_NAME
from pipeline.errors import DataError
from tests.shards import write_dataset
from tests.test_loader_faults import clips, load

NUM_SAMPLES = 20  # ten in each of two shards


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_dataset(tmp_path / "set", NUM_SAMPLES)


def shard_of(folder: Path) -> Path:
    return folder / "shard-000001.tar"


def damaged_header(folder: Path) -> None:
    """The header of the sixth sample's first member: what tar readers take for the end."""
    shard = shard_of(folder)
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[10].offset
    overwrite(shard, offset + 5)


def flipped_payload(folder: Path) -> None:
    index = ShardIndex.open(folder)
    record = next(r for r in map(index.record, range(NUM_SAMPLES)) if r.shard == 1)
    overwrite(shard_of(folder), record.places[0].offset + 100)


def truncated(folder: Path) -> None:
    with tarfile.open(shard_of(folder)) as tar:
        end = tar.getmembers()[10].offset + 700
    shard_of(folder).write_bytes(shard_of(folder).read_bytes()[:end])


def missing(folder: Path) -> None:
    shard_of(folder).unlink()


def another_shard(folder: Path) -> None:
    shard_of(folder).write_bytes((folder / "shard-000000.tar").read_bytes())


def overwrite(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_header, "10 of 10 samples, digest differs"),
        (flipped_payload, "9 of 10 samples, digest differs"),
        (truncated, "5 of 10 samples, size is"),
        (missing, "0 of 10 samples, "),
        (another_shard, "0 of 10 samples, "),
    ],
)
def test_every_damage_is_found_and_the_whole_samples_are_counted(folder, damage, words):
    index = ShardIndex.open(folder)
    damage(folder)
    shards = index.manifest.shards
    found = inspect_shards(folder, shards, index.records, everything=True)
    assert list(found) == [1]
    assert str(found[1]).startswith(f"shard shard-000001.tar: {words}")


def test_a_header_that_silently_halves_a_shard_for_tar_readers_costs_us_no_sample(folder):
    expected = clips(load(folder))
    damaged_header(folder)
    plain = wds.WebDataset(str(shard_of(folder)), shardshuffle=False, empty_check=False)
    assert len(list(plain)) == 5, "half of it, and no error"
    assert clips(load(folder)) == expected


@pytest.mark.parametrize("damage", [truncated, missing])
def test_by_default_a_damaged_shard_is_refused_with_what_is_left_of_it(folder, damage):
    damage(folder)
    with pytest.raises(DataError, match=r"shard-000001\.tar: [05] of 10 samples") as caught:
        load(folder)
    assert "on_damaged_shard" in caught.value.remedy


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [truncated, missing])
def test_quarantine_replaces_what_is_gone_of_a_shard_and_moves_nothing_else(
    folder, damage, workers
):
    expected = clips(load(folder))
    index = ShardIndex.open(folder)
    damage(folder)
    left = inspect_shards(folder, index.manifest.shards, index.records, everything=False)[1]
    settings = {"on_damaged_shard": "quarantine", "max_bad_samples": 99}
    batches = load(folder, workers=workers, **settings)
    gone = {fault.key for batch in batches for fault in batch.faults}
    assert len(gone) == left.num_samples - left.num_whole
    assert all(fault.shard == "shard-000001.tar" for b in batches for fault in b.faults)
    found = clips(batches)
    for position, (key, attempt, video) in expected.items():
        if key not in gone:
            assert found[position] == (key, attempt, video)
        else:
            assert found[position][0] not in gone


def test_quarantine_keeps_to_the_budget_of_bad_samples(folder):
    missing(folder)
    with pytest.raises(DataError, match=r"bad samples in \d+ clips, allowed are 3"):
        load(folder, on_damaged_shard="quarantine", max_bad_samples=3, max_bad_fraction=0.0)


def test_a_damaged_index_is_refused_whatever_the_policy(folder):
    overwrite(folder / INDEX_NAME, 300)
    with pytest.raises(DataError, match="SHA-256 differs"):
        load(folder, on_damaged_shard="quarantine")
