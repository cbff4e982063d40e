"""Which moments of a video a clip shows; arithmetic only.

A clip is asked for in presentation times, never in frame numbers: headers lie about frame counts
and rates, and shards may hold any rate.
"""

import math

import numpy as np

# Durations come from sums of time stamps; a frame less because of their last bit would be wrong.
_ROUNDING_SECONDS = 1e-6


def clip_times(
    duration_seconds: float, num_frames: int, fps: float, unit: float
) -> np.ndarray:  # [T]
    """Presentation times of a clip's frames, evenly spaced at 1 / fps.

    The window of num_frames / fps seconds is placed at `unit` of the way between the video's
    start and the last place where it fits. A shorter video is taken from its start at the same
    spacing, and its last frame is repeated.

    Args:
        duration_seconds: From the first frame's presentation to the end of the last frame's.
        num_frames: Frames of the clip, T.
        fps: Frames taken per second of video.
        unit: Uniform in [0, 1).

    Returns:
        Ascending seconds from the first frame, float64 [T].
    """
    window_seconds = num_frames / fps
    start_seconds = max(0.0, duration_seconds - window_seconds) * unit
    num_distinct = max(1, math.ceil((duration_seconds - _ROUNDING_SECONDS) * fps))
    steps = np.minimum(np.arange(num_frames), num_distinct - 1)
    return start_seconds + steps / fps


def reference_times(
    *, duration_seconds: float, video_frames: int, num_frames: int, fps: float, unit: float
) -> np.ndarray:  # [T]
    """`reference_indices` as presentation times, for a video of constant frame rate.

    Each time lies in the middle of its frame's display, so rounding cannot pick a neighbour.

    Args:
        duration_seconds: Length of the video.
        video_frames: Frames of the video.
        num_frames: Frames of the clip, T.
        fps: Frames asked for per second; the rule only approximates it.
        unit: Uniform in [0, 1).

    Returns:
        Ascending seconds from the first frame, float64 [T].

    Raises:
        ValueError: As `reference_indices`.
    """
    video_fps = video_frames / duration_seconds
    indices = reference_indices(video_frames, video_fps, num_frames, fps=fps, unit=unit)
    return (indices + 0.5) / video_fps


def reference_indices(
    video_frames: int, video_fps: float, num_frames: int, *, fps: float = 4.0, unit: float
) -> np.ndarray:  # [T]
    """Frame numbers by the rule of the released V-JEPA 2 loader.

    The stride is ⌈video fps⌉ // fps frames and the T frames are spread over T strides with both
    ends included, so the rate is higher than asked for: 4.28 fps for a 30 fps video and fps = 4.
    A shorter video gives its length // stride evenly spread frames, then its last one repeated.

    Args:
        video_frames: Frames of the video.
        video_fps: Its average frame rate.
        num_frames: Frames of the clip, T.
        fps: Frames asked for per second.
        unit: Uniform in [0, 1); places the window.

    Returns:
        Ascending frame numbers, int64 [T].

    Raises:
        ValueError: The video has fewer frames per second than asked for: the rule has no answer.
    """
    # A rate summed up from time stamps, such as 12.000000001, must not round up to 13.
    stride = int(math.ceil(round(video_fps, 6)) // fps)
    if stride < 1:
        raise ValueError(f"a video of {video_fps:.3g} fps cannot be sampled at {fps:g} fps")
    window = num_frames * stride
    if video_frames > window:
        start = int(unit * (video_frames - window))
        spread = np.linspace(start, start + window, num=num_frames)
        return np.clip(spread, start, start + window - 1).astype(np.int64)
    num_distinct = min(video_frames // stride, num_frames)
    spread = np.linspace(0, video_frames, num=num_distinct)
    repeated = np.full(num_frames - num_distinct, video_frames)
    return np.clip(np.concatenate([spread, repeated]), 0, video_frames - 1).astype(np.int64)
