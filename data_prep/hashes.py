"""Perceptual hashes of pictures: equal for what looks equal, however it was encoded.

A hash is 64 bits. Bit (row, column) says whether a low frequency of the picture is stronger than
the median of all 64: scale, encoder, brightness and contrast leave nearly all bits as they were,
another scene changes about half of them. The rule is that of `imagehash.phash`, as two products
of matrices.
"""

from collections.abc import Sequence

import cv2
import numpy as np

HASH_BITS = 64
# Hashes that describe one segment, at even distances within it.
HASHES_PER_SEGMENT = 8
# Below this spread of grey levels a picture shows nothing, and its hash would be noise.
_FLAT_LEVELS = 4.0
_SIDE = 32
_LOW = 8


def perceptual_hash(grey_HW: np.ndarray) -> int:
    """The hash of one picture, as an unsigned number of 64 bits; 0 for one without content.

    Args:
        grey_HW: Grey levels, uint8 of any size.
    """
    small = cv2.resize(grey_HW, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
    if small.std() < _FLAT_LEVELS:
        return 0
    low = _BASIS @ small @ _BASIS.T
    bits = np.packbits(low.ravel() > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


def to_text(hashes: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """Hashes as 16 hexadecimal digits each."""
    return tuple(f"{int(value):016x}" for value in hashes)


def from_text(texts: Sequence[str]) -> np.ndarray:
    """What `to_text` wrote, as uint64 [K]."""
    return np.array([int(text, 16) for text in texts], dtype=np.uint64)


def _cosines() -> np.ndarray:
    """The first rows of the discrete cosine transform (type II), [8, 32]."""
    frequency = np.arange(_LOW)[:, None]
    place = np.arange(_SIDE)[None, :]
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))


_BASIS = _cosines()
