"""Which segments were there before, byte for byte or to the eye.

Segments are compared in the order of their precedence: of several that are alike the first stays.
Look-alikes are found by their perceptual hashes. Comparing all pairs is out of the question, so
only segments that agree in 21 consecutive bits at one of their 8 pictures are compared; copies
that differ in 4 of 64 bits on average do so in all but one case of a thousand. A million segments
take some hundred megabytes, however many of them are alike.
"""

from collections.abc import Iterator

import numpy as np

NONE = -1
"""Stands for: no segment before is like this one."""
_BAND_BITS = 21
_BANDS_PER_HASH = 3
# A segment is compared with so many before it that agree with it in the same bits.
_NEIGHBOURS = 32
# Below this number of pictures that show something, hashes prove nothing.
_MIN_PICTURES = 4
_PAIRS_AT_A_TIME = 1 << 16


def exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """For each segment the number of the first with the same digest, if that is an earlier one.

    Args:
        digests: Digests of the stored videos in the order of precedence, bytes or text [S].

    Returns:
        int64 [S]; `NONE` for what is there for the first time.
    """
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    earliest = first[group]
    return np.where(earliest < np.arange(len(digests)), earliest, NONE)


def near_duplicates(hashes: np.ndarray, sources: np.ndarray, near_bits: float) -> np.ndarray:
    """For each segment an earlier, kept one that looks like it, if there is one.

    Segments of the same source are never called look-alikes of one another: they follow one
    another, and a quiet scene looks alike throughout.

    Args:
        hashes: Perceptual hashes of each segment's pictures in the order of precedence, uint64
            [S, 8]; 0 where a picture shows nothing.
        sources: Number of each segment's source, int64 [S].
        near_bits: Bits of 64 by which the pictures of look-alikes differ on average, at most.

    Returns:
        int64 [S]; `NONE` for what looks like nothing before it.
    """
    pool = _Pool(hashes, sources, near_bits)
    candidate = np.full(len(hashes), len(hashes), dtype=np.int64)
    for place in range(hashes.shape[1]):
        for band in range(_BANDS_PER_HASH):
            shift = np.uint64(band * _BAND_BITS)
            keys = (hashes[:, place] >> shift) & np.uint64((1 << _BAND_BITS) - 1)
            for later, earlier in pool.pairs_with_equal(keys, shown=hashes[:, place] != 0):
                np.minimum.at(candidate, later, earlier)
    return _kept_first(candidate, pool)


def mean_bits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Bits of 64 by which the pictures of pairs differ on average; infinite if too few show much.

    Args:
        first: Hashes of one segment of each pair, uint64 [P, 8].
        second: Hashes of the other.
    """
    # A picture without content equals another one without, and nothing else.
    shown = (first | second) != 0
    bits = np.bitwise_count(first ^ second).astype(np.float64).sum(axis=1)
    num_shown = shown.sum(axis=1)
    return np.where(num_shown >= _MIN_PICTURES, bits / np.maximum(num_shown, 1), np.inf)


class _Pool:
    """All segments, and which of them look alike."""

    def __init__(self, hashes: np.ndarray, sources: np.ndarray, near_bits: float) -> None:
        self._hashes, self._sources, self._near_bits = hashes, sources, near_bits

    def alike(self, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        """Whether pairs look alike, bool [P]."""
        near = mean_bits(self._hashes[later], self._hashes[earlier]) <= self._near_bits
        return near & (self._sources[later] != self._sources[earlier])

    def pairs_with_equal(
        self, keys: np.ndarray, shown: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (later, earlier) that agree in a key and look alike, some at a time."""
        order = np.argsort(keys, kind="stable")
        order = order[shown[order]]
        ordered = keys[order]
        for distance in range(1, _NEIGHBOURS + 1):
            places = np.flatnonzero(ordered[distance:] == ordered[:-distance])
            if len(places) == 0:
                return
            for start in range(0, len(places), _PAIRS_AT_A_TIME):
                some = places[start : start + _PAIRS_AT_A_TIME]
                later, earlier = order[some + distance], order[some]
                alike = self.alike(later, earlier)
                yield later[alike], earlier[alike]


def _kept_first(candidate: np.ndarray, pool: _Pool) -> np.ndarray:
    """Turns the earliest look-alike of each into the kept one; what is left out keeps nothing out.

    Likeness is not passed on: a copy of a copy is compared with the original itself.
    """
    original = np.full(len(candidate), NONE, dtype=np.int64)
    for later in np.flatnonzero(candidate < len(candidate)).tolist():
        earlier = int(candidate[later])
        if original[earlier] == NONE:
            original[later] = earlier
            continue
        root = int(original[earlier])
        if pool.alike(np.array([later]), np.array([root]))[0]:
            original[later] = root
    return original
