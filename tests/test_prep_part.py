"""What a part of the sources becomes: the right videos, refused ones with their reason, same bytes.

The parts are prepared in this process; `test_prep_run.py` has the Ray driver around them.
"""

import csv
import io
import itertools
import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.ledger import Ledger
from data_prep.part import PartJob, PartReport, prepare_part
from data_prep.settings import PrepSettings
from data_prep.sources import list_sources
from pipeline.data.decode import DecodeLimits, decode_frames, probe_media
from pipeline.data.format import ShardIndex
from pipeline.data.indexing import write_index
from tests.test_decode_frames import grid_video

DATA = Path(__file__).parent / "data"
VIDEOS = DATA / "videos"
LIMITS = DecodeLimits(max_seconds=120)
SMALL = PrepSettings(short_side=64, max_seconds=4.0)
with (DATA / "MANIFEST.csv").open(encoding="utf-8", newline="") as _file:
    ROWS = {row["file"]: row for row in csv.DictReader(_file)}


def run_part(out: Path, *roots: Path, settings: PrepSettings = SMALL, **changes) -> PartReport:
    """Prepares all sources as one part and indexes the dataset."""
    sources = list_sources(roots).sources
    ledger = Ledger(out)
    ledger.begin(sources, settings, overwrite=False)
    job = PartJob(number=0, sources=sources, settings=settings, dataset_dir=str(out), **changes)
    report = prepare_part(job)
    if report.record.shard is not None:
        write_index(out, [ledger.indexed(0, report.record.shard)], settings.as_json())
    return report


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PartReport]:
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    return out, run_part(out, VIDEOS)


def test_every_kept_test_video_is_taken_or_refused_as_its_manifest_says(
    prepared: tuple[Path, PartReport],
) -> None:
    refused = {item.source: item for item in prepared[1].record.rejections}
    for name, row in ROWS.items():
        if row["expect"] == "reject" or row["reason"] in ("too short", "picture too small"):
            assert (refused[name].reason, refused[name].kept_samples) == (row["reason"], 0), name
        elif row["expect"] == "accept":
            assert name not in refused
    # 2.8 s of one decode before its error, of the other less than the shortest segment.
    assert (refused["corrupted_midway.mp4"].reason, refused["corrupted_midway.mp4"].kept_samples) \
        == ("undecodable", 1)  # fmt: skip
    assert refused["invalid_nalu.mp4"].reason == "too short"


def test_every_segment_is_what_shards_promise(prepared: tuple[Path, PartReport]) -> None:
    index = ShardIndex.open(prepared[0])
    assert len(index) > 20
    for number in range(len(index)):
        record = index.record(number)
        info = probe_media(index.read_member(record), LIMITS, decode_everything=True)
        sidecar = index.read_sidecar(record)
        assert (info.codec, info.pixel_format, info.container) == ("h264", "yuv420p", "mov")
        assert (info.upright, info.has_b_frames, info.variable_rate) == (True, False, False)
        assert (info.first_pts_seconds, info.num_streams, info.partial) == (0.0, 1, None)
        assert info.max_gop_frames <= 16
        assert info.width % 2 == 0
        assert info.height % 2 == 0
        assert min(info.width, info.height) <= 64
        assert (info.num_frames, info.width, info.height) == (
            (record.num_frames, record.width, record.height)
        )
        assert info.duration_seconds == pytest.approx(record.duration_seconds, abs=0.126)
        assert record.duration_seconds <= 4.0
        assert (sidecar.num_frames, sidecar.fps) == (record.num_frames, 8.0)
        assert sidecar.source in ROWS
        assert sidecar.source_sha256 == ROWS[sidecar.source]["sha256"]


def test_segments_of_a_long_video_follow_one_another_and_cover_it(
    prepared: tuple[Path, PartReport],
) -> None:
    index = ShardIndex.open(prepared[0])
    sidecars = [index.read_sidecar(index.record(number)) for number in range(len(index))]
    parts = [sidecar for sidecar in sidecars if sidecar.source == "av1_540p_15s.mp4"]
    assert len(parts) == 4
    assert parts[0].segment_start_seconds == 0
    for earlier, later in itertools.pairwise(parts):
        assert later.segment_start_seconds == earlier.segment_end_seconds
        assert later.key[:-4] == earlier.key[:-4]
    assert parts[-1].segment_end_seconds == pytest.approx(15.0)


@pytest.mark.parametrize("name", ["bikes_640x272.mp4", "nonzero_start.mp4", "negative_pts.ts"])
def test_frame_k_shows_what_the_source_shows_at_that_time(tmp_path: Path, name: str) -> None:
    settings = PrepSettings(short_side=1000, max_seconds=3.0, min_seconds=0.3, crf=10)
    run_part(tmp_path / "out", VIDEOS / name, settings=settings)
    index = ShardIndex.open(tmp_path / "out")
    for number in range(len(index)):
        record = index.record(number)
        sidecar = index.read_sidecar(record)
        within = np.arange(record.num_frames) / 8
        stored = decode_frames(index.read_member(record), within, LIMITS).frames_THWC
        source = (VIDEOS / name).read_bytes()
        times = sidecar.segment_start_seconds + within
        shown = decode_frames(source, times, LIMITS).frames_THWC
        error = np.abs(stored.astype(float) - shown).mean(axis=(1, 2, 3))
        assert error.max() < 4
        # The scene moves, so the neighbour in time must fit worse: no frame is off by one.
        if name == "bikes_640x272.mp4":
            shifted = np.abs(stored[:-1].astype(float) - shown[1:]).mean(axis=(1, 2, 3))
            assert np.median(shifted / error[:-1]) > 2


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_and_mirrored_source_is_stored_upright(tmp_path: Path, degrees: int) -> None:
    video = tmp_path / "turned.mp4"
    video.write_bytes(grid_video(num_frames=16, rotation=(degrees, True, False)))
    run_part(tmp_path / "out", video, settings=PrepSettings(short_side=48, crf=5))
    index = ShardIndex.open(tmp_path / "out")
    times = np.array([0.0, 1.0])
    stored = decode_frames(index.read_member(index.record(0)), times, LIMITS).frames_THWC
    shown = decode_frames(video.read_bytes(), times, LIMITS).frames_THWC
    assert stored.shape == shown.shape
    assert np.abs(stored.astype(float) - shown).mean() < 4


def test_full_range_colours_keep_their_values(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 2, 1
        ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
        picture = np.stack([ramp, ramp.T, ramp[:, ::-1]], axis=-1)
        for number in range(16):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="JPEG"
            )
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = tmp_path / "full.mp4"
    video.write_bytes(buffer.getvalue())
    run_part(tmp_path / "out", video, settings=PrepSettings(short_side=64, crf=5))
    index = ShardIndex.open(tmp_path / "out")
    stored = decode_frames(index.read_member(index.record(0)), np.zeros(1), LIMITS).frames_THWC[0]
    # Read as limited range, black and white would be off by about 16 levels.
    assert np.abs(stored[8:-8, 8:-8].astype(float) - picture[8:-8, 8:-8]).mean() < 3.5


def test_copy_keeps_conforming_bytes_and_transcodes_the_rest(tmp_path: Path) -> None:
    sources = tmp_path / "in"
    sources.mkdir()
    (sources / "conforms.mp4").write_bytes(grid_video(num_frames=24))
    (sources / "long_gop.mp4").write_bytes(grid_video(num_frames=40, gop=40))
    shutil.copy(VIDEOS / "carphone_qcif.mp4", sources)
    settings = PrepSettings(short_side=48, mode="copy")
    run_part(tmp_path / "out", sources, settings=settings)
    index = ShardIndex.open(tmp_path / "out")
    same = {}
    for number in range(len(index)):
        source = index.read_sidecar(index.record(number)).source
        same[source] = index.read_member(index.record(number)) == (sources / source).read_bytes()
    assert same == {"conforms.mp4": True, "long_gop.mp4": False, "carphone_qcif.mp4": False}


def test_the_same_part_gives_the_same_bytes_whenever_it_is_done(tmp_path: Path) -> None:
    names = ["carphone_qcif.mp4", "nasa_rotated.mp4", "no_duration.webm", "not_a_video.mp4"]
    videos = [VIDEOS / name for name in names]
    for number in (1, 2):
        run_part(tmp_path / f"out{number}", *videos)
    for path in sorted((tmp_path / "out1").rglob("*")):
        if path.is_file():
            twin = tmp_path / "out2" / path.relative_to(tmp_path / "out1")
            assert path.read_bytes() == twin.read_bytes(), path
    assert not list((tmp_path / "out1").rglob("*.partial*"))


def test_native_rate_keeps_the_rate_of_the_source(tmp_path: Path) -> None:
    run_part(
        tmp_path / "out",
        VIDEOS / "carphone_qcif.mp4",
        settings=PrepSettings(short_side=64, fps="native"),
    )
    record = ShardIndex.open(tmp_path / "out").record(0)
    assert (record.num_frames, record.fps) == (120, pytest.approx(30000 / 1001))


def test_a_source_that_vanished_or_outlasts_its_time_is_refused_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(VIDEOS / "carphone_qcif.mp4", tmp_path / name)
    sources = list_sources([tmp_path]).sources
    (tmp_path / "a.mp4").unlink()
    out = tmp_path / "out"
    Ledger(out).begin(sources, SMALL, overwrite=False)
    report = prepare_part(PartJob(number=0, sources=sources, settings=SMALL, dataset_dir=str(out)))
    assert [item.reason for item in report.record.rejections] == ["not a regular file"]
    assert report.record.shard is not None
    hasty = PrepSettings(short_side=64, time_limit_seconds=1e-4)
    slow = run_part(tmp_path / "slow", tmp_path / "b.mp4", settings=hasty)
    assert [item.reason for item in slow.record.rejections] == ["time limit"]


@pytest.mark.collection
def test_the_whole_collection_is_sorted_into_good_and_bad(tmp_path: Path) -> None:
    folder = Path(os.environ.get("JEPA_TEST_VIDEOS", "/nowhere"))
    if not (folder / "MANIFEST.csv").exists():
        pytest.skip("JEPA_TEST_VIDEOS does not name the collection")
    with (folder / "MANIFEST.csv").open(encoding="utf-8", newline="") as file:
        kinds = {row["file"]: row["kind"] for row in csv.DictReader(file)}
    videos = [folder / name for name in kinds if not name.startswith("long_")]
    settings = PrepSettings(short_side=64, min_seconds=0.01, min_side=16)
    report = run_part(tmp_path / "out", *videos, settings=settings)
    refused = {item.source: item.kept_samples for item in report.record.rejections}
    too_small = {"-leading-dash-1x1.mp4", "one_frame.mp4"}
    assert {name for name, kept in refused.items() if kept == 0} == too_small | {
        name for name, kind in kinds.items() if kind == "odd-fail"
    }
    assert {name for name, kept in refused.items() if kept} == {
        name for name, kind in kinds.items() if kind == "odd-partial"
    }
