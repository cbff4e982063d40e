"""The whole preparation under Ray: repeated, extended, spoilt, it writes the bytes it must."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import driver
from data_prep.driver import Workers
from data_prep.estimate import estimate
from data_prep.item import ItemDone, ItemJob, prepare_item
from data_prep.kinds.opening import open_sources
from data_prep.ledger import Ledger
from data_prep.prepare import Inputs, Watch
from data_prep.settings import PrepSettings
from pipeline.cluster import local_ray
from pipeline.data.decode import DecodeLimits, decode_frames
from pipeline.data.format import ShardIndex
from pipeline.data.weights import write_weights
from pipeline.errors import DataError, UsageError
from tests.prep import run_prep, visible_files
from tests.test_decode_frames import grid_video

SETTINGS = PrepSettings(short_side=48, samples_per_shard=3, max_seconds=4.0, cut="stride")


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """Starting Ray takes seconds, so the preparations of this file share one."""
    with local_ray(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sources: two bad, one of two segments, one the same as another in another container."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(6):
        (folder / f"v{number}.mp4").write_bytes(grid_video(num_frames=16 + number))
    (folder / "v3_long.mp4").write_bytes(grid_video(num_frames=50))
    (folder / "v4_again.mp4").write_bytes(grid_video(num_frames=20))
    (folder / "v1_empty.mp4").write_bytes(b"")
    (folder / "v9_text.mp4").write_bytes(b"not a video")
    (folder / "notes.txt").write_text("not a source")
    return folder


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "dataset"
    run_prep(sources, out=out, settings=SETTINGS)
    return out


def sources_of(dataset: Path) -> list[str]:
    index = ShardIndex.open(dataset)
    return [index.read_sidecar(index.record(n)).source for n in range(len(index))]


def rejected_of(dataset: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (dataset / "rejected.jsonl").open()]
    return [(line["source"], line["reason"]) for line in lines]


def test_the_dataset_holds_what_was_put_in(undisturbed: Path) -> None:
    index = ShardIndex.open(undisturbed)
    assert [shard.num_samples for shard in index.manifest.shards] == [3, 3, 2]
    assert index.manifest.members == ("video", "sidecar")
    assert index.manifest.preparation == json.loads(json.dumps(SETTINGS.as_json()))
    # In the order of names; the long one in two parts, the second of two equal ones left out.
    expected = ["v0", "v1", "v2", "v3", "v3_long", "v3_long", "v4", "v5"]
    assert sources_of(undisturbed) == [f"{name}.mp4" for name in expected]
    assert rejected_of(undisturbed) == [
        ("notes.txt", "not a video by its name"),
        ("v1_empty.mp4", "empty"),
        ("v4_again.mp4", "duplicate"),
        ("v9_text.mp4", "not a video"),
    ]
    for number in range(len(index)):
        frames = decode_frames(index.read_member(index.record(number)), np.zeros(1), DecodeLimits())
        assert frames.frames_THWC.shape[0] == 1
    assert not (undisturbed / ".prep" / "items").exists()


def test_the_same_command_again_does_nothing_and_says_so(undisturbed: Path, sources: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir() if path.is_file()}
    report = run_prep(sources, out=undisturbed, settings=SETTINGS)
    assert (report.num_prepared, report.num_new_shards, report.num_new_sources) == (0, 0, 0)
    assert (report.num_sources, report.num_samples, report.num_others) == (10, 8, 1)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_lost_shard_is_made_again_from_its_own_sources_only(
    undisturbed: Path, sources: Path
) -> None:
    before = visible_files(undisturbed)
    times = {path.name: path.stat().st_mtime_ns for path in undisturbed.glob("*.tar")}
    lost = undisturbed / "shard-000001.tar"
    lost.write_bytes(lost.read_bytes()[:1000])
    report = run_prep(sources, out=undisturbed, settings=SETTINGS, workers=Workers(num_cpus=1))
    assert (report.num_prepared, report.num_new_shards) == (2, 1)
    assert visible_files(undisturbed) == before
    after = {path.name: path.stat().st_mtime_ns for path in undisturbed.glob("*.tar")}
    assert {name for name in times if after[name] != times[name]} == {lost.name}


def test_sources_that_are_added_become_further_shards_and_old_ones_stay(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"
    shutil.copytree(undisturbed, out)
    before, old = visible_files(out), ShardIndex.open(out).manifest
    more = tmp_path / "more"
    more.mkdir()
    # Names before all others; one of them shows what an old one shows, which stays.
    (more / "a_new.mp4").write_bytes(grid_video(num_frames=30))
    (more / "a_old.mp4").write_bytes(grid_video(num_frames=17))
    report = run_prep(more, out=out, settings=SETTINGS)
    assert (report.num_new_sources, report.num_prepared, report.num_new_shards) == (2, 2, 1)
    after, new = visible_files(out), ShardIndex.open(out).manifest
    assert {name for name in before if name.endswith(".tar") and after[name] != before[name]} == (
        set()
    )
    assert new.shards[: len(old.shards)] == old.shards
    assert new.digest != old.digest
    assert sources_of(out) == [*sources_of(undisturbed), "a_new.mp4"]
    assert ("a_old.mp4", "duplicate") in rejected_of(out)
    again = run_prep(more, sources, out=out, settings=SETTINGS)
    assert (again.digest, again.num_prepared) == (new.digest, 0)


def test_what_was_noted_and_not_published_is_published_by_the_next_run(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    (more / "b_empty.mp4").write_bytes(b"")
    out, straight = tmp_path / "dataset", tmp_path / "straight"
    for folder in (out, straight):
        shutil.copytree(undisturbed, folder)
    run_prep(more, out=straight, settings=SETTINGS)
    with Ledger.open(out, SETTINGS) as ledger:
        ledger.add_sources(open_sources([str(more)]), SETTINGS)
        ((source, item),) = ledger.pending()
        job = ItemJob(
            source=source,
            item=item,
            settings=SETTINGS,
            result=str(tmp_path / "item.tar"),
            marker=str(tmp_path / "marker"),
        )
        ledger.note(prepare_item(job).record)
    # Here a driver was killed.
    run_prep(more, out=out, settings=SETTINGS)
    assert ("b_empty.mp4", "empty") in rejected_of(out)
    assert visible_files(out) == visible_files(straight)


def test_weights_stay_as_long_as_the_samples_do(undisturbed: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "dataset", tmp_path / "more"
    shutil.copytree(undisturbed, out)
    more.mkdir()
    digest = write_weights(out, [1.0, 2.0] * 4)
    said: list[str] = []
    (more / "c_empty.mp4").write_bytes(b"")
    run_prep(more, out=out, settings=SETTINGS, watch=Watch(say=said.append))
    assert ShardIndex.open(out).manifest.weights_sha256 == digest
    (more / "c_new.mp4").write_bytes(grid_video(num_frames=33))
    run_prep(more, out=out, settings=SETTINGS, watch=Watch(say=said.append))
    assert ShardIndex.open(out).manifest.weights_sha256 is None
    assert ["weigh the samples again" in line for line in said].count(True) == 1


def test_bins_keep_shapes_and_lengths_apart(tmp_path: Path) -> None:
    videos = tmp_path / "in"
    videos.mkdir()
    for number in range(4):
        turned = (90, False, False) if number % 2 else None
        frames = 16 + number if number < 2 else 40 + number
        (videos / f"v{number}.mp4").write_bytes(grid_video(num_frames=frames, rotation=turned))
    settings = PrepSettings(short_side=48, cut="stride", bins="aspect-and-length")
    run_prep(videos, out=tmp_path / "out", settings=settings)
    index = ShardIndex.open(tmp_path / "out")
    shown = [
        (record.shard, record.width > record.height, record.duration_seconds >= 4)
        for record in map(index.record, range(len(index)))
    ]
    assert shown == [
        (0, True, False), (1, True, True), (2, False, False), (3, False, True)
    ]  # fmt: skip


def test_an_estimate_from_all_sources_is_what_comes_out_and_writes_nothing(
    sources: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"duplicates": "keep"})
    inputs, out = Inputs(arguments=(str(sources),)), tmp_path / "dataset"
    guess = estimate(inputs, out, settings, sample=100)
    assert not out.exists()
    report = run_prep(sources, out=out, settings=settings)
    assert (guess.num_sources, guess.num_sampled, guess.num_known) == (10, 10, 0)
    assert (guess.num_samples, guess.rejected) == (report.num_samples, report.rejected)
    assert guess.hours == pytest.approx(report.hours, abs=1e-6)
    assert (guess.num_others, guess.source_bytes) == (1, report.source_bytes)
    # Tar headers come on top.
    assert 0 < guess.shard_bytes < report.shard_bytes
    # An even part stands for all of them, and what is done costs nothing.
    some = estimate(inputs, tmp_path / "other", settings, sample=5)
    assert (some.num_sampled, some.num_sources) == (5, 10)
    done = estimate(inputs, out, settings)
    assert (done.num_known, done.num_sampled, done.num_samples, done.seconds) == (10, 0, 0, 0.0)


def test_another_dataset_is_never_mixed_in(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    before = visible_files(undisturbed)
    with pytest.raises(UsageError, match="--short-side was 48, now 64"):
        run_prep(sources, out=undisturbed, settings=SETTINGS.model_copy(update={"short_side": 64}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "v0.mp4").write_bytes(grid_video(num_frames=31))
    with pytest.raises(UsageError, match=r"'v0\.mp4' in .* is made of another file"):
        run_prep(other, out=undisturbed, settings=SETTINGS)
    with pytest.raises(UsageError, match=r"two sources would both be called 'v0\.mp4'"):
        run_prep(other, sources, out=tmp_path / "mixed", settings=SETTINGS)
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="not prepared by"):
        run_prep(sources, out=tmp_path, settings=SETTINGS)
    assert visible_files(undisturbed) == before


def test_overwriting_replaces_a_dataset_and_nothing_else(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    run_prep(sources / "v0.mp4", sources / "v1.mp4", out=out, settings=SETTINGS)
    (out / "README").write_text("mine")
    report = run_prep(sources / "v2.mp4", out=out, settings=SETTINGS, overwrite=True)
    assert (report.num_samples, sources_of(out)) == (1, ["v2.mp4"])
    assert (out / "README").read_text() == "mine"


def test_no_usable_video_at_all_is_a_data_error_that_names_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 sources could be used: \{'empty': 1\}") as bad:
        run_prep(tmp_path / "a.mp4", out=tmp_path / "out", settings=SETTINGS)
    assert "rejected.jsonl" in bad.value.remedy
    with pytest.raises(UsageError, match="no prepared dataset"):
        ShardIndex.open(tmp_path / "out")


def test_hostile_names_loops_and_what_cannot_be_read_are_named_and_nothing_else_is_lost(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    names = ["-dash.mp4", "new\nline.mp4", "..mp4", "$(id);'\".mp4", "n" * 250 + ".mp4", "é.mp4"]
    for number, name in enumerate(names):
        (folder / "deep" / name).write_bytes(grid_video(num_frames=16 + number))
    raw = os.fsencode(folder / "deep") + b"/caf\xe9.mp4"
    Path(os.fsdecode(raw)).write_bytes(grid_video(num_frames=30))
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "deep" / "nowhere.mp4").symlink_to("absent.mp4")
    os.mkfifo(folder / "deep" / "pipe.mp4")
    report = run_prep(folder, out=tmp_path / "out", settings=SETTINGS)
    kept = sorted(sources_of(tmp_path / "out"), key=str.encode)
    # A name that begins with a dot is a hidden file.
    expected = [f"deep/{name}" for name in names if name != "..mp4"] + ["deep/caf\\xe9.mp4"]
    assert kept == sorted(expected, key=str.encode)
    refused = dict(rejected_of(tmp_path / "out"))
    assert refused.keys() == {"deep/loop", "deep/nowhere.mp4", "deep/pipe.mp4"}
    assert refused["deep/pipe.mp4"] == "not a regular file"
    assert report.num_samples == len(names)


def hanging_decoder(job: ItemJob) -> ItemDone:
    """Where the decoder would stay for ever in one video, as no deadline between packets ends."""
    if job.source.name == "v4.mp4" and job.refuse is None:
        Path(job.marker).parent.mkdir(exist_ok=True)
        Path(job.marker).write_text(str(os.getpid()))
        threading.Event().wait()
    return prepare_item(job)


def test_a_source_at_which_the_decoder_hangs_is_left_out_and_the_rest_goes_on(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "prepare_item", hanging_decoder)
    monkeypatch.setattr(driver, "_SLACK_SECONDS", 0.0)
    settings = SETTINGS.model_copy(update={"time_limit_seconds": 1.5})
    videos = [sources / f"v{number}.mp4" for number in range(6)]
    report = run_prep(*videos, out=tmp_path / "out", settings=settings)
    assert (report.rejected, report.num_samples) == ({"decoder killed": 1}, 5)
