"""The pictures of a video as they will be stored, kept while it is decoded for the first time.

Where a video is cut is known when its last frame was seen, and which frames are stored then would
have to be decoded again. At a rate that is known beforehand the stored frames do not depend on the
cuts, so they are scaled and kept on the way, and the encoder gets them from here. A video with more
of them than there is room for is decoded twice; the bytes that are stored are the same.
"""

import math
from fractions import Fraction

from av.error import FFmpegError
from av.video.frame import VideoFrame

from data_prep.painting import Painter, stored_size
from data_prep.settings import PrepSettings
from data_prep.transcode import output_seconds, stored_rate
from pipeline.data.decode import TimedFrame
from pipeline.data.picture import shown_size

# Of what a video may take: 256 MiB by default, which is 85 s of 8 pictures of 682×384 a second.
_SHARE_OF_MEMORY = 1 / 16


def album_bytes(settings: PrepSettings) -> int:
    """What an album takes at most."""
    return int(settings.max_memory_mib * 2**20 * _SHARE_OF_MEMORY)


class Album:
    """Is shown all frames of a video in the order of presentation, and keeps those to be stored."""

    def __init__(self, settings: PrepSettings) -> None:
        self._settings = settings
        # A native rate is known at the end: until then every frame may be one that is stored.
        self._rate = None if settings.fps == "native" else stored_rate(settings, 0.0)
        self._room = album_bytes(settings)
        self._painter: Painter | None = None
        self._kept: list[TimedFrame] = []
        self._held: TimedFrame | None = None
        self._next_output = 0

    def see(self, timed: TimedFrame) -> None:
        """The next frame; the one before it is kept if an output frame shows it."""
        if self._room < 0:
            return
        seconds = timed.seconds
        if self._held is not None:
            # A clock that goes back hides nothing that was shown already.
            seconds = max(seconds, self._held.seconds)
            if self._is_shown_until(seconds):
                self._keep(self._held)
        self._held = TimedFrame(seconds=seconds, frame=timed.frame) if self._room >= 0 else None

    def pictures(self) -> list[TimedFrame] | None:
        """Pictures ready for the encoder, each with its time; None if there was no room for all.

        Ask when all frames have been shown.
        """
        if self._held is not None:
            self._keep(self._held)
            self._held = None
        return None if self._room < 0 else self._kept

    def _is_shown_until(self, seconds: float) -> bool:
        """Whether any output frame that is left comes before the next frame."""
        if self._rate is None:
            return True
        number = _first_output_from(seconds, self._rate, self._next_output)
        is_shown, self._next_output = number > self._next_output, number
        return is_shown

    def _keep(self, timed: TimedFrame) -> None:
        try:
            picture = self._painted(timed.frame)
        except FFmpegError:
            # A picture without a size, for one; it is refused elsewhere, if it is stored at all.
            self._give_up()
            return
        self._room -= sum(plane.buffer_size for plane in picture.planes)
        self._kept.append(TimedFrame(seconds=timed.seconds, frame=picture))
        if self._room < 0:
            self._give_up()

    def _painted(self, frame: VideoFrame) -> VideoFrame:
        if self._painter is None:
            size = stored_size(*shown_size(frame), self._settings.short_side)
            self._painter = Painter(*size)
        return self._painter.paint(frame)

    def _give_up(self) -> None:
        self._room, self._kept, self._held = -1, [], None


def _first_output_from(seconds: float, rate: Fraction, least: int) -> int:
    """Number of the first output frame, of `least` and those after it, not before a time."""
    number = max(least, math.ceil(seconds * rate))
    while number > least and output_seconds(number - 1, rate) >= seconds:
        number -= 1
    while output_seconds(number, rate) < seconds:
        number += 1
    return number
