"""A video whose frames get other presentation times; its packets stay as they are."""

import io
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from pipeline.data.badmedia import BadMediaError, BadReason

_TICK = Fraction(1, 1000)
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
_MAX_BYTES = 1 << 31


def retimed(content: Path | bytes, times: np.ndarray) -> tuple[bytes, int]:
    """The k-th shown frame of a video at `times[k]`, in Matroska.

    Frames beyond the last time are left out of the result, but counted.

    Args:
        content: A video of which every packet is a frame.
        times: Strictly ascending seconds, float64 [T].

    Returns:
        The video and the frames that the original has.

    Raises:
        BadMediaError: It is no video that can be copied.
    """
    opened = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
    try:
        with (
            opened,
            av.open(
                opened,
                "r",
                container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"},
            ) as source,
        ):
            return _copied(source, times)
    except (FFmpegError, OSError, MemoryError) as error:
        raise BadMediaError(BadReason.NOT_A_VIDEO, str(error).splitlines()[0][:200]) from error


def _copied(source: InputContainer, times: np.ndarray) -> tuple[bytes, int]:
    stream = source.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise BadMediaError(BadReason.NO_VIDEO_STREAM)
    packets = [packet for packet in source.demux(stream) if packet.size]
    if sum(packet.size for packet in packets) > _MAX_BYTES or not packets:
        raise BadMediaError(BadReason.TOO_MANY_BYTES if packets else BadReason.EMPTY)
    clocks = [packet.pts if packet.pts is not None else packet.dts for packet in packets]
    if any(clock is None for clock in clocks):
        raise BadMediaError(BadReason.UNDECODABLE, "a frame has no presentation time")
    places = np.argsort(np.argsort(np.array(clocks), kind="stable"), kind="stable")
    # Two stamps within a millisecond must not fall together.
    ticks = np.maximum.accumulate(
        np.round(times / float(_TICK)).astype(np.int64) - np.arange(len(times))
    ) + np.arange(len(times))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options={"fflags": "+bitexact"}) as target:
        _write(target, stream, packets, places, ticks)
    return buffer.getvalue(), len(packets)


def _write(
    target: OutputContainer,
    stream: VideoStream,
    packets: list[Packet],
    places: np.ndarray,
    ticks: np.ndarray,
) -> None:
    copy = target.add_stream_from_template(stream)
    copy.time_base = _TICK
    # Packets are stored in decoding order, which is counted up to where presentation allows it.
    kept = [(p, k) for p, k in zip(packets, places.tolist(), strict=True) if k < len(ticks)]
    early = max((int(ticks[n] - ticks[k]) for n, (_, k) in enumerate(kept)), default=0)
    for number, (packet, place) in zip(itertools.count(), kept, strict=False):
        packet.stream = copy
        packet.time_base = _TICK
        packet.pts = int(ticks[place])
        packet.dts = int(ticks[number]) - early
        packet.duration = 0
        target.mux(packet)
