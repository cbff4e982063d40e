"""Shots, figures of pictures, and what is left out, on clips whose cuts are known."""

import io
import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import imagehash
import numpy as np
import pytest
from PIL import Image

from data_prep.filters import unfit
from data_prep.hashes import from_text, perceptual_hash, to_text
from data_prep.measure import Measured, measure
from data_prep.records import SegmentFigures, Source
from data_prep.settings import PrepSettings
from data_prep.shots import worth_keeping
from data_prep.transcode import plan_segments, transcode
from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.decode import DecodeLimits, decode_frames

VIDEOS = Path(__file__).parent / "data" / "videos"
SETTINGS = PrepSettings()
Picture = Callable[[float], np.ndarray]


def scene(seed: int, speed: float = 20.0) -> Picture:
    """A patchwork that moves to the right, uint8 RGB [96, 128, 3] at a time."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(20, 236, size=(6, 12, 3), dtype=np.uint8)
    wide = np.kron(colours, np.ones((16, 32, 1), np.uint8))
    return lambda seconds: np.roll(wide, -int(seconds * speed), axis=1)[:, :128]


def clip(
    *parts: tuple[Picture, float], fps: int | Fraction = 24, container: str = "mp4", **options: str
) -> bytes:
    """A video of scenes that follow one another, each of some seconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=fps, options={"crf": "18", **options})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.thread_count = 1
        number = 0
        for picture, seconds in parts:
            for place in range(round(seconds * fps)):
                frame = av.VideoFrame.from_ndarray(picture(place / float(fps)), format="rgb24")
                frame.pts, frame.time_base = number, 1 / Fraction(fps)
                output.mux(stream.encode(frame))
                number += 1
        output.mux(stream.encode(None))
    return buffer.getvalue()


def black(_: float) -> np.ndarray:
    return np.zeros((96, 128, 3), np.uint8)


def night(_: float) -> np.ndarray:
    picture = black(0)
    picture[40:60, 50:80] = 220
    return picture


@pytest.fixture(scope="module")
def three_scenes() -> tuple[bytes, Measured]:
    payload = clip((scene(1), 5.0), (scene(2), 2.0), (scene(3), 6.0))
    return payload, measure(payload, SETTINGS)


def test_cuts_are_found_where_the_scene_changes(three_scenes: tuple[bytes, Measured]) -> None:
    shots = three_scenes[1].shots
    assert [start for start, _ in shots] == pytest.approx([0.0, 5.0, 7.0], abs=0.05)
    assert [end for _, end in shots] == pytest.approx([5.0, 7.0, 13.0], abs=0.15)
    assert shots[0][1] <= shots[1][0]
    assert measure(three_scenes[0], PrepSettings(cut="stride")).shots == ((0.0, 13.0),)


def test_fast_motion_and_short_flashes_are_no_cuts() -> None:
    quick = clip((scene(4, speed=160.0), 6.0))
    assert len(measure(quick, SETTINGS).shots) == 1


@pytest.mark.parametrize("fps", [8.0, "native"])
def test_no_stored_frame_shows_another_scene(
    three_scenes: tuple[bytes, Measured], fps: float | str
) -> None:
    settings = PrepSettings(fps=fps, min_shot_seconds=1.0)  # pyright: ignore[reportArgumentType]
    payload, found = three_scenes
    shots = found.shots_of(Source(name="a", locator="a", num_bytes=1, modified_ns=1), settings)
    plan = plan_segments(found.info, settings, shots.kept)
    segments = list(transcode(payload, plan, settings))
    assert len(segments) == 3
    for segment in segments:
        times = np.array([0.0, segment.end_seconds - segment.start_seconds])
        ends = decode_frames(segment.payload, times, DecodeLimits()).frames_THWC.astype(int)
        # A neighbour's palette is another one; within a scene the same colours wander.
        counts = [np.histogramdd(f.reshape(-1, 3), 4, [(0, 256)] * 3)[0] for f in ends]
        assert np.minimum(counts[0], counts[1]).sum() / (96 * 128) > 0.4


def test_short_shots_are_left_out_but_a_video_of_one_is_kept_whole() -> None:
    kept = worth_keeping([(0.0, 5.0), (5.0, 7.0), (7.0, 13.0)], SETTINGS)
    assert kept.kept == ((0.0, 5.0), (7.0, 13.0))
    assert kept.too_short == ((5.0, 7.0),)
    assert worth_keeping([(0.0, 1.5)], SETTINGS).kept == ((0.0, 1.5),)
    # Of a video of short shots alone the longest stays.
    assert worth_keeping([(0.0, 2.0), (2.0, 5.0), (5.0, 6.0)], SETTINGS).kept == ((2.0, 5.0),)
    with pytest.raises(BadMediaError) as caught:
        worth_keeping([(0.0, 0.5), (0.5, 1.2)], SETTINGS)
    assert caught.value.reason is BadReason.TOO_SHORT


def test_spans_of_a_source_replace_the_shots(three_scenes: tuple[bytes, Measured]) -> None:
    source = Source(
        name="a", locator="a", num_bytes=1, modified_ns=1, spans=((1.0, 6.0), (9.0, 99.0))
    )
    assert three_scenes[1].shots_of(source, SETTINGS).kept == ((1.0, 6.0), (9.0, 13.0))


def test_figures_tell_black_from_dark_and_still_from_moving() -> None:
    found = measure(clip((black, 3.0), (night, 3.0), (scene(5), 3.0)), SETTINGS)
    nothing, dark, moving = (found.figures(start, start + 3.0) for start in (0.0, 3.0, 6.0))
    assert [f.black_share for f in (nothing, dark, moving)] == [1.0, 0.0, 0.0]
    assert [f.still_share for f in (nothing, dark)] == [1.0, 1.0]
    assert moving.still_share < 0.1
    assert dark.motion < 1
    assert moving.motion > 20
    assert set(nothing.hashes) == {"0" * 16}
    assert len(moving.hashes) == 8


def test_every_threshold_leaves_out_what_it_says_and_keeps_the_figures() -> None:
    figures = SegmentFigures(motion=2.0, black_share=0.5, still_share=0.25, hashes=())
    lenient = {"max_black_share": 1.0, "max_still_share": 1.0, "min_motion": 0.0}
    assert unfit(figures, PrepSettings(**lenient)) is None
    for change, reason in (
        ({"max_black_share": 0.4}, BadReason.BLACK),
        ({"max_still_share": 0.2}, BadReason.STILL),
        ({"min_motion": 3.0}, BadReason.LITTLE_MOTION),
    ):
        why = unfit(figures, PrepSettings(**{**lenient, **change}))
        assert why is not None
        assert why.reason is reason
        assert why.figures == {"motion": 2.0, "black_share": 0.5, "still_share": 0.25}


def test_hashes_are_those_of_the_imagehash_library() -> None:
    generator = np.random.default_rng(3)
    for _ in range(50):
        grey = generator.integers(0, 256, size=(32, 32), dtype=np.uint8)
        expected = int(str(imagehash.phash(Image.fromarray(grey))), 16)
        assert perceptual_hash(grey) == expected
    values = np.array([0, 1, 2**64 - 1], dtype=np.uint64)
    np.testing.assert_array_equal(from_text(to_text(values)), values)


def test_the_digest_of_frames_survives_another_container_and_nothing_else() -> None:
    # In milliseconds, as Matroska has it, other frames stand at the eighths of a second.
    fps = Fraction(30000, 1001)
    payload = clip((scene(6), 3.0), (scene(7), 3.0), fps=fps)
    buffer = io.BytesIO()
    with av.open(io.BytesIO(payload)) as source, av.open(buffer, "w", format="matroska") as packed:
        stream = packed.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                packed.mux(packet)
    again = clip((scene(6), 3.0), (scene(7), 3.0), fps=fps, crf="19")
    found = [measure(p, SETTINGS) for p in (payload, buffer.getvalue(), again)]
    digests = [one.content_sha256(3.0, 6.0) for one in found]
    assert digests[0] == digests[1] != digests[2]
    assert found[0].content_sha256(0.0, 3.0) != digests[0]


def test_pictures_looked_at_are_those_stored_at_eight_a_second() -> None:
    for name in ("variable_rate.mp4", "negative_pts.ts", "carphone_qcif.mp4"):
        found = measure(VIDEOS / name, SETTINGS)
        payload = (VIDEOS / name).read_bytes()
        times = np.arange(0, found.info.duration_seconds, 1 / 8)
        shown = np.unique(decode_frames(payload, times, DecodeLimits()).times)
        np.testing.assert_allclose(found.pictures.seconds[: len(shown)], shown, atol=1e-6)
        assert len(found.pictures.seconds) - len(shown) in (0, 1)


def test_segments_of_a_long_shot_are_equal_and_follow_one_another() -> None:
    found = measure(VIDEOS / "carphone_qcif.mp4", SETTINGS)
    plan = plan_segments(found.info, PrepSettings(max_seconds=1.5), [(0.0, 4.1)])
    assert [end - first for first, end in plan.spans] == [11, 11, 11]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(plan.spans))
