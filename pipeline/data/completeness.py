"""Is a video file all there? Many that were cut off decode to where they end without an error.

Containers say how long their parts are; a part that reaches beyond the file's end was cut off.
Only sizes are looked at, some bytes a part, whatever the length of the file.
"""

import os
from typing import BinaryIO

_MAX_PARTS = 100_000
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"
# Only a file that does not end as one should is walked through; an hour has some 250,000 tags.
_MAX_TAGS = 1_000_000
_FLV_KINDS = frozenset({8, 9, 18})
_OGG_PAGE = b"OggS\0"
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255
_START_CODE = b"\0\0\1"
_MAX_PACK_BYTES = 1 << 18
# Header, data, and the three kinds of index.
_ASF_OBJECTS = frozenset(
    bytes.fromhex(text)
    for text in (
        "3026b2758e66cf11a6d900aa0062ce6c",
        "3626b2758e66cf11a6d900aa0062ce6c",
        "90080033b1e5cf1189f400a0c90349cb",
        "d329e2d6da35d111903400a0c90349be",
        "f803b1fead12644c840f2a1d2f7ad48c",
    )
)
_TS_PACKET_BYTES = 188
_TS_SYNC = 0x47
# Writers of AVI files round sizes up to even numbers that the file need not have.
_RIFF_SLACK_BYTES = 1


def missing_bytes(file: BinaryIO, container: str) -> int:
    """Bytes that a file lacks by the sizes its container names; 0 if it is whole or none can tell.

    MP4 and QuickTime, Matroska and WebM, AVI, ASF, FLV, Ogg, MPEG program and transport streams can
    tell; the last four not if they were cut between two parts. The file's position is moved.

    Args:
        file: The file, seekable.
        container: FFmpeg's name of the container's family, as `MediaReader.container_name`.
    """
    beyond = _BEYOND.get(container)
    return 0 if beyond is None else beyond(file, file.seek(0, os.SEEK_END))


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


def _beyond_objects(file: BinaryIO, size: int) -> int:
    """ASF: top-level objects of an identifier and their size; a live stream's ends the walk."""
    place = 0
    for _ in range(_MAX_PARTS):
        head = _at(file, place, 24)
        length = int.from_bytes(head[16:24], "little")
        if head[:16] not in _ASF_OBJECTS or length < 24:
            return 0
        place += length
        if place > size:
            return place - size
    return 0


def _beyond_tags(file: BinaryIO, size: int) -> int:
    """FLV: tags of 11 bytes and their content, each followed by its size in 4 bytes."""
    last = int.from_bytes(_at(file, max(0, size - 4), 4), "big")
    place = size - 4 - last
    if place > 0 and last == 11 + int.from_bytes(_at(file, place + 1, 3), "big"):
        # It ends as a file does, and need not be walked through.
        return 0
    place = int.from_bytes(_at(file, 5, 4), "big") + 4
    for _ in range(_MAX_TAGS):
        head = _at(file, place, 4)
        if not head or head[0] & 0x1F not in _FLV_KINDS:
            return 0
        place += 11 + int.from_bytes(head[1:].ljust(3, b"\0"), "big")
        if place > size:
            return place - size
        place += 4
    return 0


def _beyond_pages(file: BinaryIO, size: int) -> int:
    """Ogg (RFC 3533): pages of 27 bytes, a table of lengths, and their content."""
    start = max(0, size - 2 * _OGG_PAGE_BYTES)
    tail = _at(file, start, size - start)
    place = tail.find(_OGG_PAGE)
    while place >= 0:
        end = _end_of_pages(tail, place)
        if end is not None:
            return end - len(tail)
        # What looked like a page was in the middle of one.
        place = tail.find(_OGG_PAGE, place + 1)
    return 0


def _end_of_pages(tail: bytes, place: int) -> int | None:
    """Where the last of the pages from a place on ends; None if anything else comes first."""
    while place < len(tail):
        head = tail[place : place + 27]
        if not _OGG_PAGE.startswith(head[:5]):
            return None
        if len(head) < 27:
            return place + 27
        table = tail[place + 27 : place + 27 + head[26]]
        place += 27 + head[26] + sum(table)
    return place


def _beyond_packs(file: BinaryIO, size: int) -> int:
    """MPEG program stream (ISO/IEC 13818-1, 2.5): packets with sizes, from the last pack on."""
    start = max(0, size - _MAX_PACK_BYTES)
    tail = _at(file, start, size - start)
    place = tail.rfind(_START_CODE + b"\xba")
    while 0 <= place <= len(tail) - 4:
        length = _packet_bytes(tail[place : place + 14])
        if length is None:
            return 0
        place += length
    return max(0, place - len(tail))


def _packet_bytes(head: bytes) -> int | None:
    """Size of a pack's header or of a packet; None at the end code, or what is neither."""
    kind = head[3]
    if head[:3] != _START_CODE or kind < 0xBA:
        return None
    if kind != 0xBA:
        return 6 + int.from_bytes(head[4:6], "big")
    is_mpeg1 = len(head) > 4 and head[4] >> 6 == 0
    return 12 if is_mpeg1 else 14 + (head[13] & 7 if len(head) > 13 else 0)


def _at(file: BinaryIO, place: int, length: int) -> bytes:
    file.seek(place)
    return file.read(length)


_BEYOND = {
    "mov": _beyond_boxes,
    "matroska": _beyond_segment,
    "avi": _beyond_chunks,
    "asf": _beyond_objects,
    "flv": _beyond_tags,
    "ogg": _beyond_pages,
    "mpeg": _beyond_packs,
    "mpegts": _beyond_packets,
}
