"""What a source becomes: the right segments, or a refusal with its reason; always the same bytes.

Sources are prepared in this process; `test_prep_run.py` has the Ray driver around them.
"""

import csv
import io
import itertools
import json
import multiprocessing
import resource
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.allocation import allocate, unfinished_shards
from data_prep.item import ItemJob, prepare_item
from data_prep.kinds.opening import open_sources
from data_prep.ledger import Ledger
from data_prep.pack import ShardJob, pack_shard
from data_prep.publication import publish_dataset
from data_prep.records import Rejection
from data_prep.settings import PrepSettings
from pipeline.data.decode import DecodeLimits, decode_frames, probe_media
from pipeline.data.format import ShardIndex
from pipeline.errors import StorageError
from tests.test_decode_frames import grid_video

DATA = Path(__file__).parent / "data"
VIDEOS = DATA / "videos"
LIMITS = DecodeLimits(max_seconds=120)
SMALL = PrepSettings(short_side=64, max_seconds=4.0, cut="stride")
ALL = {"max_black_share": 1.0, "duplicates": "keep"}
with (DATA / "MANIFEST.csv").open(encoding="utf-8", newline="") as _file:
    ROWS = {row["file"]: row for row in csv.DictReader(_file)}


def job_of(source: object, item: str, ledger: Ledger, settings: PrepSettings) -> ItemJob:
    return ItemJob(
        source=source,
        item=item,
        settings=settings,
        result=str(ledger.item_path(item)),
        marker=str(ledger.marker_path(item)),
    )


def run_here(out: Path, *roots: Path, settings: PrepSettings = SMALL) -> list[Rejection]:
    """Prepares all sources one after the other; what is wrong with them."""
    with Ledger.open(out, settings) as ledger:
        ledger.add_sources(open_sources([str(root) for root in roots]), settings)
        for source, item in ledger.pending():
            ledger.note(prepare_item(job_of(source, item, ledger, settings)).record)
        allocate(ledger, settings)
        for plan in unfinished_shards(ledger):
            items = tuple((str(ledger.item_path(item)), keys) for item, keys in plan.items)
            shard, rows = ledger.shard_path(plan.number), ledger.shard_rows(plan.number)
            pack_shard(ShardJob(number=plan.number, items=items, shard=str(shard), rows=str(rows)))
            ledger.database.execute("UPDATE shard SET done = 1")
        rejections = list(ledger.rejections())
        if list(out.glob("*.tar")):
            publish_dataset(ledger, settings)
    return rejections


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rejection]]:
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    # A black video stays where a person wants it, and its equal parts as well.
    return out, run_here(out, VIDEOS, settings=SMALL.model_copy(update=ALL))


def test_every_kept_test_video_is_taken_or_refused_as_its_manifest_says(
    prepared: tuple[Path, list[Rejection]],
) -> None:
    refused = {item.source: item for item in prepared[1]}
    for name, row in ROWS.items():
        if row["expect"] == "reject" or row["reason"] in ("too short", "picture too small"):
            assert (refused[name].reason, refused[name].kept_samples) == (row["reason"], 0), name
        elif row["expect"] == "accept":
            assert name not in refused
    # 2.8 s of one decode before its error, of the other less than the shortest segment.
    assert (refused["corrupted_midway.mp4"].reason, refused["corrupted_midway.mp4"].kept_samples) \
        == ("undecodable", 1)  # fmt: skip
    assert refused["invalid_nalu.mp4"].reason == "too short"


def test_every_segment_is_what_shards_promise(prepared: tuple[Path, list[Rejection]]) -> None:
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
    prepared: tuple[Path, list[Rejection]],
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
    run_here(tmp_path / "out", VIDEOS / name, settings=settings)
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
    run_here(tmp_path / "out", video, settings=PrepSettings(short_side=48, crf=5))
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
    run_here(tmp_path / "out", video, settings=PrepSettings(short_side=64, crf=5))
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
    run_here(tmp_path / "out", sources, settings=settings)
    index = ShardIndex.open(tmp_path / "out")
    same = {}
    for number in range(len(index)):
        source = index.read_sidecar(index.record(number)).source
        same[source] = index.read_member(index.record(number)) == (sources / source).read_bytes()
    assert same == {"conforms.mp4": True, "long_gop.mp4": False, "carphone_qcif.mp4": False}


def test_the_same_sources_give_the_same_bytes_whenever_they_are_done(tmp_path: Path) -> None:
    names = ["carphone_qcif.mp4", "nasa_rotated.mp4", "no_duration.webm", "not_a_video.mp4"]
    videos = [VIDEOS / name for name in names]
    for number in (1, 2):
        run_here(tmp_path / f"out{number}", *videos)
    for path in sorted((tmp_path / "out1").rglob("*")):
        if path.is_file() and path.suffix != ".sqlite":
            twin = tmp_path / "out2" / path.relative_to(tmp_path / "out1")
            assert path.read_bytes() == twin.read_bytes(), path
    assert not list((tmp_path / "out1").rglob("*.partial*"))


def test_native_rate_keeps_the_rate_of_the_source(tmp_path: Path) -> None:
    run_here(
        tmp_path / "out",
        VIDEOS / "carphone_qcif.mp4",
        settings=PrepSettings(short_side=64, fps="native"),
    )
    record = ShardIndex.open(tmp_path / "out").record(0)
    assert (record.num_frames, record.fps) == (120, pytest.approx(30000 / 1001))


def test_a_source_that_vanished_or_outlasts_its_time_is_refused(tmp_path: Path) -> None:
    shutil.copy(VIDEOS / "carphone_qcif.mp4", tmp_path / "a.mp4")
    (source,) = open_sources([str(tmp_path / "a.mp4")])
    hasty = SMALL.model_copy(update={"time_limit_seconds": 1e-4})
    with Ledger.open(tmp_path / "out", SMALL) as ledger:
        late = prepare_item(job_of(source, "late", ledger, hasty)).record
        (tmp_path / "a.mp4").unlink()
        gone = prepare_item(job_of(source, "gone", ledger, SMALL)).record
    assert [one.reason for one in late.rejections] == ["time limit"]
    assert [one.reason for one in gone.rejections] == ["not a regular file"]


def test_captions_and_labels_go_with_the_part_that_they_speak_of(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(grid_video(num_frames=60))
    captions = [
        {"t0": 0.0, "t1": 1.0, "text": "first"},
        {"t0": 3.0, "t1": 5.0, "text": "over the cut"},
        {"t0": 90.0, "t1": 91.0, "text": "after the end"},
    ]
    (tmp_path / "a.captions.json").write_text(json.dumps(captions))
    run_here(tmp_path / "out", tmp_path)
    index = ShardIndex.open(tmp_path / "out")
    stored = [
        [(one.t0, one.t1, one.text) for one in index.read_captions(index.record(number))]
        for number in range(2)
    ]
    # Cut at 3.75 s into two equal parts.
    assert stored == [
        [(0.0, 1.0, "first"), (3.0, 3.75, "over the cut")],
        [(0.0, 1.25, "over the cut")],
    ]


def write_beyond_the_limit(out: Path) -> None:
    """Exits with 0 if a full disk is told as such and nothing half-written stays."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    (source,) = open_sources([str(VIDEOS / "carphone_qcif.mp4")])
    result = out / "item.tar"
    job = ItemJob(
        source=source,
        item="item",
        settings=SMALL,
        result=str(result),
        marker=str(out / "marker"),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        prepare_item(job)
    except StorageError as error:
        raise SystemExit(0 if "cannot be written" in str(error) and not any(out.iterdir()) else 2)  # noqa: B904
    raise SystemExit(1)


def test_an_item_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=write_beyond_the_limit, args=(tmp_path,)
    )
    process.start()
    process.join(timeout=200)
    assert process.exitcode == 0
