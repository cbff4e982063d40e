"""Which frame is decoded for which time: compared with a linear decode of the whole file.

The reference decodes everything in order and takes, for each time, the last frame presented by
then. It knows nothing of seeking, so any file in which a seek leads elsewhere shows here.
"""

import csv
import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.data.decode import (
    BadMediaError,
    BadReason,
    DecodeLimits,
    MediaReader,
    decode_frames,
    probe_media,
)

DATA = Path(__file__).parent / "data"
VIDEOS = DATA / "videos"
LIMITS = DecodeLimits(max_seconds=120)
with (DATA / "MANIFEST.csv").open(encoding="utf-8", newline="") as _file:
    READABLE = [row["file"] for row in csv.DictReader(_file) if row["expect"] == "accept"]


def linear(payload: bytes) -> tuple[np.ndarray, list[av.VideoFrame]]:
    """Presentation times from the first frame, in seconds, and the frames; sorted by time."""
    container = av.open(io.BytesIO(payload), "r")
    stream = container.streams.best("video")
    frames = list(container.decode(stream))
    first = frames[0].pts
    seconds = np.array([float((frame.pts - first) * stream.time_base) for frame in frames])
    order = np.argsort(seconds, kind="stable")
    return seconds[order], [frames[number] for number in order]


def check_against_linear(payload: bytes, seed: int, num_trials: int) -> None:
    seconds, frames = linear(payload)
    generator = np.random.default_rng(seed)
    for _ in range(num_trials):
        start = generator.uniform(0, seconds[-1] * 1.1 + 0.1)
        times = start + np.sort(generator.uniform(0, 1.5, size=3))
        got = decode_frames(payload, times, LIMITS)
        wanted = np.maximum(np.searchsorted(seconds, times + 1e-6, side="right") - 1, 0)
        np.testing.assert_allclose(got.times, seconds[wanted], atol=1e-9)
        picture = frames[wanted[0]].to_ndarray(format="rgb24", threads=1)
        if got.frames_THWC.shape[1:] == picture.shape and frames[0].rotation == 0:
            np.testing.assert_array_equal(got.frames_THWC[0], picture)


@pytest.mark.parametrize("name", READABLE)
def test_frames_are_those_of_a_linear_decode(name: str) -> None:
    check_against_linear((VIDEOS / name).read_bytes(), seed=len(name), num_trials=3)


@pytest.mark.collection
def test_frames_of_the_whole_collection_are_those_of_a_linear_decode() -> None:
    folder = os.environ.get("JEPA_TEST_VIDEOS")
    if not folder:
        pytest.skip("JEPA_TEST_VIDEOS does not name the collection")
    num_checked = 0
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in {".csv", ""} or path.name.startswith("long_"):
            continue
        try:
            info = probe_media(path, LIMITS, decode_everything=True)
        except BadMediaError:
            continue
        if info.partial is None:
            check_against_linear(path.read_bytes(), seed=num_checked, num_trials=3)
            num_checked += 1
    assert num_checked > 40


def test_a_time_past_the_end_repeats_the_last_frame_and_zero_is_the_first() -> None:
    payload = (VIDEOS / "carphone_qcif.mp4").read_bytes()
    seconds, frames = linear(payload)
    got = decode_frames(payload, np.array([0.0, 3.0, 50.0, 60.0]), LIMITS)
    np.testing.assert_allclose(got.times[[0, 2, 3]], seconds[[0, -1, -1]])
    last = frames[-1].to_ndarray(format="rgb24", threads=1)
    np.testing.assert_array_equal(got.frames_THWC[3], last)


def test_only_what_a_clip_needs_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = MediaReader.frames

    def counting(reader):
        for timed in original(reader):
            seen.append(timed.seconds)
            yield timed

    monkeypatch.setattr(MediaReader, "frames", counting)
    payload = grid_video(num_frames=160, gop=16)
    decode_frames(payload, np.array([15.0, 15.5]), LIMITS)
    # The first frame (for the file's clock), then from the keyframe before to the frame after.
    assert seen == [0.0, *np.arange(14.0, 15.7, 1 / 8)]


def grid_video(
    *, num_frames: int, gop: int = 16, rotation: tuple[int, bool, bool] | None = None
) -> bytes:
    """8 fps, 64×48, a bright corner, brightness growing with the frame number."""
    buffer = io.BytesIO()
    options = {"g": str(gop), "bf": "0", "sc_threshold": "0"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        for number in range(num_frames):
            picture = np.full((48, 64, 3), number % 64, dtype=np.uint8)
            picture[:16, :16] = 250
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)])
def test_pictures_come_as_they_are_shown_in_all_eight_orientations(
    degrees: int, mirrored: tuple[bool, bool]
) -> None:
    plain = decode_frames(grid_video(num_frames=2), np.array([0.0]), LIMITS).frames_THWC[0]
    payload = grid_video(num_frames=2, rotation=(degrees, *mirrored))
    expected = np.rot90(plain, degrees // 90)
    expected = expected[:, ::-1] if mirrored[0] else expected
    expected = expected[::-1] if mirrored[1] else expected
    got = decode_frames(payload, np.array([0.0]), LIMITS).frames_THWC[0]
    np.testing.assert_array_equal(got, expected)
    info = probe_media(payload, LIMITS)
    assert (info.height, info.width) == expected.shape[:2]
    assert info.upright == (degrees == 0 and mirrored == (False, False))


def test_full_range_colour_comes_out_like_limited_range() -> None:
    """Both reference files show the same scene; read naively one would be off by 14 levels."""
    # Only where the larger collection is: two files of it differ in nothing but the range.
    folder = Path(os.environ.get("JEPA_TEST_VIDEOS", "/nowhere"))
    if not (folder / "bt601_full_range.mp4").exists():
        pytest.skip("JEPA_TEST_VIDEOS does not name the collection")
    pictures = [
        decode_frames((folder / name).read_bytes(), np.array([1.0]), LIMITS).frames_THWC[0]
        for name in ("bt601_full_range.mp4", "bt601_limited_range.mp4")
    ]
    difference = pictures[0].astype(int) - pictures[1]
    assert np.abs(difference.mean(axis=(0, 1))).max() < 3


def test_a_file_that_breaks_midway_decodes_before_and_is_refused_after() -> None:
    payload = (VIDEOS / "corrupted_midway.mp4").read_bytes()
    assert decode_frames(payload, np.array([0.0, 1.0]), LIMITS).times[1] == pytest.approx(1.0)
    with pytest.raises(BadMediaError) as caught:
        decode_frames(payload, np.array([1.0, 4.0]), LIMITS)
    assert caught.value.reason is BadReason.UNDECODABLE


@pytest.mark.parametrize("times", [[], [[0.0]], [np.nan], [-0.1], [1.0, 0.5], [np.inf]], ids=repr)
def test_times_that_make_no_sense_are_the_callers_mistake(times: list[float]) -> None:
    with pytest.raises(ValueError, match="times must"):
        decode_frames(grid_video(num_frames=2), np.array(times), LIMITS)
