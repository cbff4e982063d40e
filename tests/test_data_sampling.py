import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sampling import clip_times, reference_indices, reference_times


@given(
    duration=st.floats(0.05, 600.0),
    num_frames=st.integers(1, 64),
    fps=st.floats(0.5, 30.0),
    unit=st.floats(0.0, 1.0, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_times_ascend_and_lie_inside_the_video(duration, num_frames, fps, unit):
    times = clip_times(duration, num_frames, fps, unit)
    assert times.shape == (num_frames,)
    assert times.dtype == np.float64
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0.0
    assert times[-1] < duration


def test_a_window_that_fits_is_evenly_spaced_wherever_it_is_placed():
    for unit in (0.0, 0.3, 0.999):
        times = clip_times(10.0, 16, 4.0, unit)
        np.testing.assert_allclose(np.diff(times), 0.25)
        assert times[0] == pytest.approx(unit * 6.0)


def test_a_short_video_is_taken_from_its_start_and_its_last_frame_repeated():
    expected = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(clip_times(1.1, 8, 4.0, 0.9), expected)


def test_a_duration_a_rounding_error_too_long_gives_no_additional_frame():
    np.testing.assert_array_equal(clip_times(1.0 + 1e-9, 8, 4.0, 0.0), clip_times(1.0, 8, 4.0, 0.0))


def test_reference_indices_are_the_released_loaders():
    long = [0, 7, 14, 22, 29, 37, 44, 52, 59, 67, 74, 82, 89, 97, 104, 111]
    assert reference_indices(300, 29.97, 16, unit=0.0).tolist() == long
    short = [0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 32, 35, 38, 41, 44, 44]
    assert reference_indices(45, 12.0, 16, unit=0.5).tolist() == short
    padded = reference_indices(300, 25.0, 64, unit=0.5)
    assert len(set(padded[:50].tolist())) == 50
    assert padded[49:].tolist() == [299] * 15


def test_reference_windows_begin_everywhere_the_released_loader_can():
    # 300 frames, window 112: the end is drawn from 112 … 299, so the start from 0 … 187.
    starts = {
        int(reference_indices(300, 29.97, 16, unit=u)[0]) for u in np.linspace(0, 1, 999)[:-1]
    }
    assert (min(starts), max(starts)) == (0, 187)


def test_reference_times_show_the_reference_frames():
    indices = reference_indices(300, 300 / 10.01, 16, unit=0.4)
    times = reference_times(
        duration_seconds=10.01, video_frames=300, num_frames=16, fps=4.0, unit=0.4
    )
    frame_times = np.arange(300) * 10.01 / 300
    assert (np.searchsorted(frame_times, times, side="right") - 1).tolist() == indices.tolist()


def test_a_video_slower_than_the_rate_asked_for_has_no_reference_indices():
    with pytest.raises(ValueError, match="3 fps cannot be sampled at 4 fps"):
        reference_indices(30, 3.0, 16, unit=0.0)
