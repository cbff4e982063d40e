"""Is a video file all there? Many that were cut off decode to where they end without an error.

Containers say how long their parts are; a part that reaches beyond the file's end was cut off.
Only sizes are looked at, some bytes a part, whatever the length of the file.
"""

import os
from typing import BinaryIO

_MAX_PARTS = 100_000
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"
_TS_PACKET_BYTES = 188
_TS_SYNC = 0x47
# Writers of AVI files round sizes up to even numbers that the file need not have.
_RIFF_SLACK_BYTES = 1


def missing_bytes(file: BinaryIO, container: str) -> int:
    """Bytes that a file lacks by the sizes its container names; 0 if it is whole or none can tell.

    MP4 and QuickTime, Matroska and WebM, AVI and MPEG transport streams can tell; the rest cannot.
    The file's position is moved.

    Args:
        file: The file, seekable.
        container: FFmpeg's name of the container's family, as `MediaReader.container_name`.
    """
    size = file.seek(0, os.SEEK_END)
    if container == "mov":
        return _beyond_boxes(file, size)
    if container == "matroska":
        return _beyond_segment(file, size)
    if container == "avi":
        return _beyond_chunks(file, size)
    return _beyond_packets(file, size) if container == "mpegts" else 0


def _beyond_boxes(file: BinaryIO, size: int) -> int:
    """ISO/IEC 14496-12, 4.2: size and type; size 1 means 64 bits follow, 0 to the end."""
    place = 0
    for _ in range(_MAX_PARTS):
        head = _at(file, place, 16)
        if len(head) < 8:
            return 0
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:
            return 0
        place += length
        if place > size:
            return place - size
    return 0


def _beyond_segment(file: BinaryIO, size: int) -> int:
    """RFC 8794: the header element, then the segment; a size of all ones is unknown."""
    head = _at(file, 0, 12)
    length, width = _varied(head[4:])
    place = 4 + width + (length or 0)
    head = _at(file, place, 12)
    if head[:4] != _MATROSKA_SEGMENT:
        return 0
    length, width = _varied(head[4:])
    return max(0, place + 4 + width + length - size) if length is not None else 0


def _varied(head: bytes) -> tuple[int | None, int]:
    """A number of variable length and its own; None if it is the unknown size, or damaged."""
    width = 9 - head[0].bit_length() if head and head[0] else 0
    if not 0 < width <= len(head):
        return None, 0
    bits = 7 * width
    value = int.from_bytes(head[:width], "big") & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), width


def _beyond_chunks(file: BinaryIO, size: int) -> int:
    """RIFF chunks, one after the other: their size stands without their own 8 bytes."""
    place = 0
    for _ in range(_MAX_PARTS):
        head = _at(file, place, 8)
        if len(head) < 8 or head[:4] != b"RIFF":
            return 0
        place += 8 + int.from_bytes(head[4:], "little")
        if place > size + _RIFF_SLACK_BYTES:
            return place - size
    return 0


def _beyond_packets(file: BinaryIO, size: int) -> int:
    """A transport stream has packets of one size and no length; half a packet tells."""
    head = _at(file, 0, _TS_PACKET_BYTES + 1)
    plain = len(head) > _TS_PACKET_BYTES and head[0] == head[_TS_PACKET_BYTES] == _TS_SYNC
    return -size % _TS_PACKET_BYTES if plain else 0


def _at(file: BinaryIO, place: int, length: int) -> bytes:
    file.seek(place)
    return file.read(length)
