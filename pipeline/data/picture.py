"""A decoded frame as it is shown: converted to RGB, turned and mirrored by its display matrix."""

import struct

import numpy as np

from pipeline.data.media import SideDataContainer, VideoFrame, VideoReformatter


def to_rgb(
    frame: VideoFrame,
    *,
    width: int | None = None,
    height: int | None = None,
    reformatter: VideoReformatter | None = None,
) -> np.ndarray:
    """A frame as shown, uint8 RGB [H, W, 3].

    Args:
        frame: A decoded frame.
        width: Width to scale the stored picture to.
        height: Height to scale the stored picture to.
        reformatter: Share one among the frames of a video: a new one prepares its tables anew.
    """
    converted = (reformatter or VideoReformatter()).reformat(
        frame, width=width, height=height, format="rgb24", threads=1
    )
    return as_shown(converted.to_ndarray(), frame)


def as_shown(picture_HWC: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """A frame's picture as stored, turned and mirrored as the frame wants to be shown."""
    return _oriented(picture_HWC, _display_matrix(frame))


def shown_size(frame: VideoFrame) -> tuple[int, int]:
    """Width and height as shown."""
    a, b, _, _ = _display_matrix(frame)
    return (frame.height, frame.width) if abs(b) > abs(a) else (frame.width, frame.height)


def is_upright(frame: VideoFrame) -> bool:
    """False if the picture has to be turned or mirrored to be shown."""
    a, b, _, d = _display_matrix(frame)
    return abs(a) >= abs(b) and a > 0 and d > 0


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: x' = a·x + c·y, y' = b·x + d·y."""
    # Not `frame.side_data`: it keeps the frame in a reference cycle, and hundreds of pictures stay
    # in memory until the garbage collector comes by.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # pyright: ignore[reportCallIssue]
    if matrix is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    return (a, b, c, d)


def _oriented(picture_HWC: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turned and mirrored as the matrix says, in quarter turns.

    PyAV's `frame.rotation` gives the angle only, so a mirrored picture would come out wrong.
    """
    a, b, c, d = matrix
    if abs(b) > abs(a):
        picture_HWC = picture_HWC.transpose(1, 0, 2)
        mirror_x, mirror_y = c < 0, b < 0
    else:
        mirror_x, mirror_y = a < 0, d < 0
    return picture_HWC[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
