"""Every test video gets the outcome its manifest states, and stored frames are the right ones.

The reference is a linear decode of the whole file by PyAV alone: for output frame k the last
frame presented by k / fps, turned by hand.
"""

import csv
import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from data_prep.hdr import is_hdr
from data_prep.measure import measure
from data_prep.records import Source
from data_prep.settings import PrepSettings
from data_prep.transcode import plan_segments, transcode
from pipeline.data.completeness import missing_bytes
from pipeline.data.decode import BadMediaError, BadReason, DecodeLimits, decode_frames, probe_media

DATA = Path(__file__).parent / "data"
SETTINGS = PrepSettings(short_side=128, min_seconds=0.03, min_shot_seconds=0.0, min_side=16, crf=8)
SUBSET = [
    *("av1_540p_15s.mp4", "edit_list_discard_first.mp4", "fragmented_no_count.mp4"),
    *("h264_10bit.mp4", "nasa_hdr_hevc10.mp4", "nasa_rotated.mp4", "negative_pts.ts"),
    *("nonzero_start.mp4", "odd_dims_mpeg2.mp4", "odd_dims_vp9.mp4"),
    *("rotated_270.mov", "variable_rate.mp4", "no_duration.webm"),
]


def linear(path: Path, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Small pictures [T, H, W, 3] as shown at some times, and all pictures' times."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        seconds, small = [], []
        for frame in container.decode(stream):
            seconds.append(float(frame.pts * stream.time_base))
            picture = frame.reformat(width=64, height=48, format="rgb24").to_ndarray()
            small.append(np.rot90(picture, frame.rotation // 90))
    order = np.argsort(seconds, kind="stable")
    shown = np.array(seconds)[order] - min(seconds)
    wanted = np.maximum(np.searchsorted(shown, times + 1e-6, side="right") - 1, 0)
    return np.stack([small[order[number]] for number in wanted]), shown


def shrunk(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The same pictures at another size, by the scaler of the reference."""
    frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(f), "rgb24") for f in frames_THWC]
    small = [f.reformat(width=width, height=height, format="rgb24") for f in frames]
    return np.stack([f.to_ndarray() for f in small])


def check_stored_frames(path: Path) -> None:
    """Compares the whole stored video with the reference, frame by frame."""
    found = measure(path, SETTINGS)
    source = Source(name=path.name, locator=str(path), num_bytes=1, modified_ns=1)
    plan = plan_segments(found.info, SETTINGS, found.shots_of(source, SETTINGS).kept)
    with av.open(str(path)) as container:
        first = next(container.decode(container.streams.best("video")))
    for segment in transcode(path, plan, SETTINGS):
        times = np.arange(segment.num_frames) / 8
        stored = decode_frames(segment.payload, times, DecodeLimits(max_seconds=120))
        np.testing.assert_allclose(stored.times, times, atol=1e-3)
        expected, _ = linear(path, segment.start_seconds + times)
        got = shrunk(stored.frames_THWC, *expected.shape[1:3])
        # A mirrored picture is not in the reference's power; its own test has all orientations.
        # Tone mapping changes every level, so order is all that can be compared there.
        if "reflect" not in path.name:
            close(path.name, got, expected, exact=not is_hdr(first))


def close(name: str, got: np.ndarray, expected: np.ndarray, *, exact: bool) -> None:
    if exact:
        difference = np.abs(got.astype(int) - expected).mean(axis=(1, 2, 3))
        # Fine patterns suffer from being scaled twice, yet never look like the next frame.
        steps = np.abs(np.diff(expected.astype(int), axis=0)).mean(axis=(1, 2, 3))
        assert difference.max() < max(9, 0.4 * (steps.min() if len(steps) else 0)), (
            name,
            difference,
        )
        return
    for mine, wanted in zip(got, expected, strict=True):
        if wanted.std() > 2:
            assert np.corrcoef(mine.ravel(), wanted.ravel())[0, 1] > 0.8, name


@pytest.mark.parametrize("name", SUBSET)
def test_stored_frames_are_those_shown_at_their_times(name: str) -> None:
    check_stored_frames(DATA / "videos" / name)


@pytest.mark.parametrize(
    ("container", "name"),
    [
        ("mp4", "bikes_640x272.mp4"),
        ("matroska", "bikes_640x272.mp4"),
        ("mpegts", "bikes_640x272.mp4"),
        ("flv", "bikes_640x272.mp4"),
        ("webm", "odd_dims_vp9.mp4"),
        ("avi", "mpeg4"),
        ("asf", "mpeg4"),
        ("flv", "flv1"),
        ("mpeg", "mpeg1video"),
        ("ogg", "libvpx"),
    ],
)
def test_a_truncated_file_is_noticed_even_where_the_decoder_raises_nothing(
    tmp_path: Path, container: str, name: str
) -> None:
    whole, cut = tmp_path / f"whole.{container}", tmp_path / f"cut.{container}"
    if "." not in name:
        encode(whole, container, name)
    else:
        repack(DATA / "videos" / name, whole, container)
    info = probe_media(whole, DecodeLimits(), decode_everything=True)
    assert info.partial is None
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 7 // 10 + 1])
    broken = probe_media(cut, DecodeLimits(), decode_everything=True)
    assert broken.partial is not None
    assert broken.partial.startswith(("truncated", "undecodable"))
    assert 0.3 < broken.duration_seconds / info.duration_seconds < 0.95


def repack(path: Path, out: Path, container: str) -> None:
    """The same packets in another container; an MP4 with its table of frames in front."""
    options = {"movflags": "faststart"} if container == "mp4" else {}
    with av.open(str(path)) as source, av.open(str(out), "w", container, options=options) as packed:
        stream = packed.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                packed.mux(packet)


@pytest.mark.parametrize(
    ("container", "codec", "name"),
    [
        ("flv", "flv1", "flv"),
        ("mpeg", "mpeg1video", "mpeg"),
        ("vob", "mpeg2video", "mpeg"),
        ("ogg", "libvpx", "ogg"),
        ("asf", "wmv2", "asf"),
    ],
)
def test_a_whole_file_is_never_called_cut_off_and_a_cut_one_hardly_ever_whole(
    tmp_path: Path, container: str, codec: str, name: str
) -> None:
    encode(tmp_path / "whole", container, codec)
    whole = (tmp_path / "whole").read_bytes()
    assert missing_bytes(io.BytesIO(whole), name) == 0
    # What others append is no part that is missing.
    assert missing_bytes(io.BytesIO(whole + b"appended by another program"), name) == 0
    cuts = range(len(whole) // 3, len(whole), 97)
    found = [missing_bytes(io.BytesIO(whole[:cut]), name) for cut in cuts]
    assert all(count <= len(whole) - cut for count, cut in zip(found, cuts, strict=True))
    # Between two parts nothing tells.
    assert sum(count > 0 for count in found) > 0.97 * len(found)


def encode(out: Path, container_name: str, codec: str) -> None:
    with av.open(str(out), "w", container_name) as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):
            noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
        container.mux(stream.encode(None))


def outcome(path: Path) -> str:
    """What becomes of a file: `whole`, `partial` or the reason of its refusal."""
    try:
        return "partial" if measure(path, SETTINGS).info.partial else "whole"
    except BadMediaError as error:
        return str(error.reason)


@pytest.mark.collection
@pytest.mark.timeout(900)
def test_the_whole_collection_meets_its_manifest_and_stores_the_right_frames() -> None:
    folder = Path(os.environ.get("JEPA_TEST_VIDEOS", "/nowhere"))
    if not folder.is_dir():
        pytest.skip("JEPA_TEST_VIDEOS does not name the collection")
    with (folder / "MANIFEST.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    refusals = {str(reason) for reason in BadReason}
    for row in rows:
        became = outcome(folder / row["file"])
        if row["kind"] == "odd-fail":
            assert became in refusals, row["file"]
            continue
        assert became == ("partial" if row["kind"] == "odd-partial" else "whole"), row["file"]
        # One frame and one pixel make no segment; the long ones show nothing that others do not.
        skipped = row["file"].startswith(("long_", "-leading", "one_frame"))
        if became == "whole" and not skipped:
            check_stored_frames(folder / row["file"])
