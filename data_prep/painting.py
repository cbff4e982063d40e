"""A decoded frame → the picture that is stored: scaled, upright, 8-bit 4:2:0, of limited range."""

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from data_prep.hdr import is_hdr, tone_mapped
from pipeline.data.decode import to_rgb
from pipeline.data.picture import as_shown, is_upright, shown_size


def stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height as shown, even, with at most `short_side` pixels on the short side."""
    scale = min(1.0, short_side / min(width, height))

    def even(pixels: int) -> int:
        # Down where the size stays: a picture is cropped by scaling, never enlarged.
        return int(pixels * scale) // 2 * 2 if scale == 1.0 else round(pixels * scale / 2) * 2

    return even(width), even(height)


class Painter:
    """Makes the pictures that are stored of decoded frames: scaled, turned, converted.

    Args:
        width: Width stored, as shown.
        height: Height stored, as shown.
    """

    def __init__(self, width: int, height: int) -> None:
        self._size = width, height
        # A new one prepares its tables anew.
        self._reformatter = VideoReformatter()

    def paint(self, frame: VideoFrame) -> VideoFrame:
        """One frame's picture: 8-bit 4:2:0 of limited range, upright."""
        if is_upright(frame) and not is_hdr(frame):
            return self._reformatter.reformat(
                frame,
                *self._size,
                format="yuv420p",
                dst_color_range="MPEG",
                threads=1,
            )
        turned = shown_size(frame) != (frame.width, frame.height)
        width, height = reversed(self._size) if turned else self._size
        if is_hdr(frame):
            picture_HWC = as_shown(tone_mapped(frame, width, height), frame)
        else:
            picture_HWC = to_rgb(frame, width=width, height=height, reformatter=self._reformatter)
        upright = VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), format="rgb24")
        return upright.reformat(format="yuv420p", threads=1)
