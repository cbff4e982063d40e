"""Pictures kept from the first decode give the bytes that a second decode would give."""

import math
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest
from av.video.frame import VideoFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.album import Album, album_bytes
from data_prep.measure import measure
from data_prep.settings import PrepSettings
from data_prep.transcode import SegmentPlan, plan_segments, resampled, transcode
from pipeline.data.decode import TimedFrame

VIDEOS = Path(__file__).parent / "data" / "videos"
SMALL = PrepSettings(short_side=64, min_seconds=0.05, min_shot_seconds=0.0, max_seconds=3.0)
NAMES = ["nasa_rotated.mp4", "variable_rate.mp4", "h264_10bit.mp4", "corrupted_midway.mp4"]


@pytest.mark.parametrize("name", [*NAMES, "negative_pts.ts", "rotated_270.mov"])
@pytest.mark.parametrize("fps", [8.0, 23.976, "native"])
def test_kept_pictures_are_stored_as_those_of_a_second_decode(name: str, fps: float) -> None:
    chosen = SMALL.model_copy(update={"fps": fps})
    album = Album(chosen)
    found = measure(VIDEOS / name, chosen, album.see)
    plan = plan_segments(found.info, chosen)
    pictures = album.pictures()
    assert pictures is not None
    kept = [one.payload for one in transcode(Path("nowhere"), plan, chosen, pictures)]
    assert kept == [one.payload for one in transcode(VIDEOS / name, plan, chosen)]
    assert kept


def numbered(number: int, seconds: float) -> TimedFrame:
    frame = VideoFrame(32, 32, "yuv420p")
    frame.pts = number
    return TimedFrame(seconds=seconds, frame=frame)


@given(
    ticks=st.lists(st.integers(-20, 120), min_size=1, max_size=40),
    jump=st.sampled_from([0, 3, 10**9]),
    rate=st.sampled_from([1.0, 8.0, 29.97]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_clock_does_the_same_frames_are_shown(
    ticks: list[int], jump: int, rate: float
) -> None:
    # From the first frame, as a decode counts.
    times = [0.0, *(tick / 24 for tick in ticks), ticks[-1] / 24 + jump]
    frames = [numbered(number, seconds) for number, seconds in enumerate(times)]
    plan = SegmentPlan(
        fps=Fraction(rate).limit_denominator(1001),
        spans=(),
        num_frames=0,
        width=32,
        height=32,
        partial=None,
    )
    album = Album(PrepSettings(short_side=32, fps=rate))
    for frame in frames:
        album.see(frame)
    pictures = album.pictures()
    assert pictures is not None
    # Nothing but the end is shown after ten seconds.
    outputs = math.ceil(10 * rate)
    first, second = (
        [one.pts for one in islice(resampled(iter(some), plan), outputs)]
        for some in (frames, pictures)
    )
    assert first == second
    assert {one.frame.pts for one in pictures} == {*first, len(times) - 1}


def test_a_video_with_more_pictures_than_there_is_room_for_is_not_kept() -> None:
    narrow = SMALL.model_copy(update={"max_memory_mib": 0.5})
    assert album_bytes(narrow) < 16 * 64 * 64 * 3 // 2
    for chosen, is_kept in ((SMALL, True), (narrow, False)):
        album = Album(chosen)
        for number in range(40):
            album.see(numbered(number, number / 8))
        assert (album.pictures() is not None) == is_kept


def test_a_picture_that_cannot_be_scaled_is_left_to_those_who_judge_it() -> None:
    album = Album(SMALL)
    measure(VIDEOS / "-leading-dash-1x1.mp4", SMALL, album.see)
    assert album.pictures() is None
