"""Which sample stands at a global position: a pure function of (seed, position).

Positions are dealt out in blocks of K slots. In a block every source holds a whole number of
slots, so proportions are exact at every block border; a permutation keyed by the block scatters
the slots. How often a source has come up before a block is a closed formula, so position 10⁹ is
found as fast as position 0 and nothing is stored but the position itself. A source is passed
through in full, in a new order each time, before any of its samples comes again; small sources
begin their next epoch earlier than large ones.

A source whose samples have weights is drawn from systematically: an epoch of its N clips asks at N
evenly spaced shares of the whole weight, in a permuted order, so a sample of weight w comes up
⌊N·w/W⌋ or ⌈N·w/W⌉ times in every epoch. From epoch to epoch the shares are shifted by the golden
ratio, so that what is rounded evens out as fast as it can.
"""

import itertools
import math
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from functools import lru_cache

import numpy as np

from pipeline.clip import ClipRef
from pipeline.data.weights import WeightTable
from pipeline.errors import ConfigError, DataError

_NUM_ROUNDS = 6  # Luby and Rackoff prove four; two more cost 2 µs and forgive the plain hash
_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
_MAX_DRAWS = 64


class Purpose(IntEnum):
    """What a random number is for; keeps draws apart that share seed and position.

    The numbers are part of the order: changing one changes every run.
    """

    SLOTS = 1
    SAMPLES = 2
    SUBSTITUTE = 3
    CLIP_START = 4
    CROP = 5
    SAMPLE_WEIGHTS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderSpec:
    """Everything that the order of samples depends on.

    Args:
        seed: The run's seed.
        sizes: Samples of each source.
        weights: Share of each source among the clips, in any unit.
        block: Slots per block, K.
        tables: Weights of each source's samples, where it has them; none has if left out.

    Raises:
        DataError: A source has no samples.
        ConfigError: A weight is not positive, or there are too many sources for the block.
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    block: int = 1000
    tables: tuple[WeightTable | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.weights) or not self.sizes:
            raise ConfigError(
                f"{len(self.sizes)} sources and {len(self.weights)} weights: expected at least "
                "one source and as many weights as sources"
            )
        for number, (size, weight) in enumerate(zip(self.sizes, self.weights, strict=True)):
            if size < 1:
                raise DataError(f"source {number} has no samples")
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"source {number} has weight {weight}, expected more than 0")
        others = len(self.weights) - 1
        if self.block * max(self.weights) < others * sum(self.weights):
            # Below this the largest source, which absorbs all rounding, could owe slots.
            raise ConfigError(
                f"{len(self.sizes)} sources do not fit a mixture block of {self.block} clips",
                remedy=f"Set mixture_block to {others * len(self.sizes)} or more.",
            )


def clip_ref(order: OrderSpec, position: int, attempt: int = 0) -> ClipRef:
    """The sample at a global position.

    Args:
        order: Seed, sources and weights.
        position: 0-based number of the clip in the whole run.
        attempt: 0 for the sample itself; n for the n-th substitute, another sample of the same
            source, if the sample and n - 1 substitutes turned out to be bad.
    """
    block, offset = divmod(position, order.block)
    sources, counters = _dealt_block(order.seed, order.weights, order.block, block)
    source, counter = int(sources[offset]), int(counters[offset])
    size = order.sizes[source]
    epoch, index = divmod(counter, size)
    sample = permute(index, size, _epoch_key(order.seed, source, epoch))
    table = order.tables[source] if order.tables else None
    if table is not None:
        shift = _unit(mix(order.seed, Purpose.SAMPLE_WEIGHTS, source) + epoch * _GOLDEN64)
        sample = table.sample_at((sample + shift) / size)
        if attempt > 0:
            sample = _other_by_weight(order.seed, table, sample, position, attempt)
    elif attempt > 0 and size > 1:
        # An offset of 1 … size - 1 never comes back to the sample that is bad.
        offset = mix(order.seed, Purpose.SUBSTITUTE, position, attempt) % (size - 1)
        sample = (sample + 1 + offset) % size
    return ClipRef(position=position, source=source, sample=sample, epoch=epoch, attempt=attempt)


def random_units(seed: int, position: int, purpose: Purpose, num: int) -> np.ndarray:  # [num]
    """Uniform numbers in [0, 1) of one clip for one purpose: Philox keyed by all three.

    Made of the raw bits, which NumPy keeps the same in all releases, unlike its distributions.
    """
    key = np.array([mix(seed, purpose), position], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw(num)
    return (bits >> np.uint64(11)) * 2.0**-53


def permute(value: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) puts `value`, without a table.

    A six-round Feistel network over pairs of digits (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains", §5), walked along its cycle until the result lies in range(size);
    the digits' bases are about √size, so nearly every first result does.
    """
    high_base, low_base = _bases(size)
    while True:
        value = _feistel(value, high_base, low_base, key)
        if value < size:
            return value


def mix(*words: int) -> int:
    """A 64-bit hash of non-negative integers (a chain of SplitMix64 finalisers)."""
    state = 0
    for word in words:
        state = _finalise((state ^ (word & _MASK64)) + _GOLDEN64)
    return state


def _other_by_weight(
    seed: int, table: WeightTable, sample: int, position: int, attempt: int
) -> int:
    """A substitute, by weight as well; the same sample only if hardly another has any weight."""
    other = sample
    for draw in range(_MAX_DRAWS):
        other = table.sample_at(_unit(mix(seed, Purpose.SUBSTITUTE, position, attempt, draw)))
        if other != sample:
            break
    return other


def _unit(bits: int) -> float:
    """64 bits as a number in [0, 1)."""
    return ((bits & _MASK64) >> 11) * 2.0**-53


@lru_cache(maxsize=64)
def _dealt_block(
    seed: int, weights: tuple[float, ...], block_size: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """For every position of a block its source, and how many clips that gave before it.

    Kept for a while, because 1000 positions that follow one another need the same.
    """
    before = np.array(_clips_before(weights, block_size, block))
    clips = np.array(_clips_before(weights, block_size, block + 1)) - before
    # Of few bits, which are sorted in a third of the time.
    numbers = np.arange(len(weights), dtype=np.min_scalar_type(len(weights)))
    holders = np.repeat(numbers, clips)
    sources = holders[_permuted_range(block_size, mix(seed, Purpose.SLOTS, block))]
    # Positions source by source, each source's in their order.
    grouped = np.argsort(sources, kind="stable")
    counters = np.empty(block_size, dtype=np.int64)
    starts = np.cumsum(clips) - clips
    counters[grouped] = np.arange(block_size) + np.repeat(before - starts, clips)
    return sources, counters


def _permuted_range(size: int, key: int) -> np.ndarray:
    """`permute` of all values of range(size) at once: the same numbers, in 30 µs for a thousand.

    A round adds to one half a hash of the other, and a half has few values: it is the hashes of
    those that are computed, for all rounds at once, and then looked up.
    """
    tables = _tables(size)
    high, low = tables.high, tables.low
    for masks, wrapped in zip(_masks(tables, key), itertools.cycle(tables.wrapped), strict=False):
        high, low = low, wrapped.take(high + masks.take(low))
    images = high * tables.bases[1] + low
    values = images[:size]
    while len(beyond := np.flatnonzero(values >= size)):
        values[beyond] = images.take(values[beyond])
    return values


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Tables:
    """What all permutations of one size share; the domain is all pairs of digits."""

    bases: tuple[int, int]
    high: np.ndarray
    """High digit of every value of the domain, int64; `low` the same."""
    low: np.ndarray
    wrapped: tuple[np.ndarray, np.ndarray]
    """A sum of two digits → its remainder, for even and odd rounds."""
    hashed_RD: np.ndarray
    """What goes into the hash of each round and digit, but for the key, uint64."""
    moduli_R1: np.ndarray


@lru_cache(maxsize=8)
def _tables(size: int) -> _Tables:
    bases = high_base, low_base = _bases(size)
    high, low = np.divmod(np.arange(high_base * low_base), low_base)
    digits = np.arange(high_base, dtype=np.uint64) << np.uint64(8)
    rounds = [number * _GOLDEN64 & _MASK64 for number in range(_NUM_ROUNDS)]
    return _Tables(
        bases=bases,
        high=high,
        low=low,
        wrapped=(np.arange(2 * high_base) % high_base, np.arange(2 * low_base) % low_base),
        hashed_RD=digits + np.array(rounds, dtype=np.uint64)[:, None],
        moduli_R1=np.array([bases[n % 2] for n in range(_NUM_ROUNDS)], dtype=np.uint64)[:, None],
    )


def _masks(tables: _Tables, key: int) -> np.ndarray:
    """What each round adds for each digit, int64; sums wrap around as `_finalise` lets them."""
    state = tables.hashed_RD + np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) % tables.moduli_R1).astype(np.int64)


def _bases(size: int) -> tuple[int, int]:
    high_base = math.isqrt(size - 1) + 1
    return high_base, -(-size // high_base)


def _clips_before(weights: tuple[float, ...], block_size: int, block: int) -> tuple[int, ...]:
    """Clips that each source gives in the blocks before `block`; they sum to block · K.

    All but the heaviest source get ⌊w · block · K⌋, which never falls as blocks go on; the
    heaviest takes what is left.
    """
    numerators, denominator = _shares(weights)
    total = block * block_size
    clips = [numerator * total // denominator for numerator in numerators]
    heaviest = numerators.index(max(numerators))
    clips[heaviest] += total - sum(clips)
    return tuple(clips)


@lru_cache(maxsize=8)
def _shares(weights: tuple[float, ...]) -> tuple[tuple[int, ...], int]:
    """Weights as exact fractions of their sum: numerators and the common denominator.

    A float stands for the decimal that was written in the configuration: 0.1 means 1/10.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    denominator = math.lcm(*(share.denominator for share in shares))
    return tuple(int(share * denominator) for share in shares), denominator


@lru_cache(maxsize=256)
def _epoch_key(seed: int, source: int, epoch: int) -> int:
    return mix(seed, Purpose.SAMPLES, source, epoch)


def _feistel(value: int, high_base: int, low_base: int, key: int) -> int:
    high, low = divmod(value, low_base)
    bases = (high_base, low_base)
    for number in range(_NUM_ROUNDS):
        mask = _finalise(key + number * _GOLDEN64 + (low << 8))
        high, low = low, (high + mask) % bases[number % 2]
    return high * low_base + low


def _finalise(state: int) -> int:
    state &= _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)
