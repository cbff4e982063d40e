"""`jepa prep lint` finds every kind of damage and nothing on a whole dataset; `stats` counts."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.lint import lint
from data_prep.stats import dataset_stats, draw
from pipeline.cli import main
from pipeline.data.format import ShardIndex
from pipeline.data.indexing import IndexedShard, write_index
from pipeline.data.layout import INDEX_NAME, Member
from pipeline.data.manifest import read_manifest
from pipeline.errors import DataError
from tests.shards import FPS, HEIGHT, WIDTH, write_dataset

NUM_SAMPLES = 9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("whole") / "dataset", NUM_SAMPLES)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(bytes(content))


def first_shard(dataset: Path) -> Path:
    return dataset / read_manifest(dataset).shards[0].name


def flip_a_video(dataset: Path) -> None:
    index = ShardIndex.open(dataset)
    record = index.record(0)
    flip(index.shard_path(record), record.place(Member.VIDEO).offset + 40)


def flip_a_header(dataset: Path) -> None:
    record = ShardIndex.open(dataset).record(1)
    offset = min(place.offset for place in record.places if place.length)
    flip(first_shard(dataset), offset - 512)


def cut_off(dataset: Path) -> None:
    shard = first_shard(dataset)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def swap_shards(dataset: Path) -> None:
    one, two = (dataset / shard.name for shard in read_manifest(dataset).shards)
    other = two.read_bytes()
    one.rename(two)
    one.write_bytes(other)


def test_a_whole_dataset_has_no_findings_and_all_its_clips_decode(whole: Path):
    report = lint(whole, every=1)
    assert report.findings == ()
    assert report.num_decoded == report.num_samples == NUM_SAMPLES
    assert lint(whole, every=4).num_decoded == 3


def test_more_workers_find_the_same(copy: Path):
    flip_a_video(copy)
    assert lint(copy, every=2, workers=2) == lint(copy, every=2)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_a_video, "another video"),
        (flip_a_header, "damaged header"),
        (cut_off, "bytes, manifest.json names"),
        (swap_shards, "manifest.json"),
        (lambda dataset: first_shard(dataset).unlink(), "missing"),
        (lambda dataset: flip(dataset / INDEX_NAME, -10), "its SHA-256 is not"),
        (lambda dataset: shutil.copy(first_shard(dataset), dataset / "x.tar"), "not in manifest"),
    ],
)
def test_damage_is_found_and_named(copy: Path, damage: Callable[[Path], None], expected: str):
    damage(copy)
    assert any(expected in finding.what for finding in lint(copy, every=1).findings)


def test_an_index_that_disagrees_with_the_videos_is_found_although_every_digest_fits(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", 4)
    records = np.load(dataset / INDEX_NAME)
    records["num_frames"][2] += 1
    rewrite_index(dataset, records)
    found = lint(dataset, every=1).findings
    assert any("num_frames" in finding.what for finding in found)
    assert any("frames: index.npy names" in finding.what for finding in found)


def test_an_index_with_any_damaged_byte_of_its_header_is_refused(copy: Path):
    whole = (copy / INDEX_NAME).read_bytes()
    for offset in range(0, 420, 7):
        flip(copy / INDEX_NAME, offset)
        assert INDEX_NAME in trouble_of(copy)
        (copy / INDEX_NAME).write_bytes(whole)


def trouble_of(dataset: Path) -> str:
    try:
        return " ".join(finding.where for finding in lint(dataset).findings)
    except DataError as error:
        return str(error)


def rewrite_index(dataset: Path, records: np.ndarray) -> None:
    """A forger's work: an index and a manifest that fit each other, and not the shards."""
    shards = []
    for number, entry in enumerate(read_manifest(dataset).shards):
        own = records[records["shard"] == number].copy()
        shards.append(IndexedShard(entry=entry, records=own))
    write_index(dataset, shards)


def test_rows_that_do_not_fit_their_times_are_found(tmp_path):
    def states(seed: int) -> dict[str, bytes]:
        members = {}
        for name, array in (
            ("times.npy", np.arange(6, dtype="<f8")),
            ("states.npy", np.zeros((4 if seed == 1 else 6, 2), dtype="<f4")),
        ):
            buffer = io.BytesIO()
            np.save(buffer, array)
            members[name] = buffer.getvalue()
        return members

    dataset = write_dataset(tmp_path / "dataset", 3, extra=states)
    findings = lint(dataset, every=1).findings
    assert [finding.what for finding in findings] == ["states.npy has 4 rows for 6 times"]


def test_the_verb_tells_findings_and_ends_with_the_code_of_damaged_data(copy: Path, capsys):
    assert main(["prep", "lint", str(copy), "--every", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    cut_off(copy)
    assert main(["prep", "lint", str(copy)]) == 65
    shown = capsys.readouterr()
    assert first_shard(copy).name in shown.out
    assert "what to do" in shown.err
    assert main(["prep", "lint", str(copy), "--every", "0"]) == 2


def test_stats_count_what_the_index_holds_and_draw_a_picture(whole: Path, tmp_path: Path):
    stats = dataset_stats(whole)
    index = ShardIndex.open(whole)
    assert (stats.num_samples, stats.codecs) == (NUM_SAMPLES, {"h264": NUM_SAMPLES})
    assert all(sum(histogram.counts) == NUM_SAMPLES for histogram in stats.histograms)
    by_name = {histogram.name: histogram for histogram in stats.histograms}
    assert by_name["frame rate"].median == FPS
    assert by_name["short side"].largest == min(WIDTH, HEIGHT)
    longest = max(index.record(sample).duration_seconds for sample in range(NUM_SAMPLES))
    assert by_name["duration"].largest == pytest.approx(longest, abs=1e-3)
    draw(stats, tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
