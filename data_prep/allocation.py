"""Which segments are kept and which shard each goes into: a function of the segments alone.

Segments come in the order of their sources' names; with bins, those of one shape and length come
together. A shard is full when it has so many segments or bytes. What is allocated once stays:
sources added later only ever make further shards.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.duplicates import NONE, exact_duplicates, near_duplicates
from data_prep.hashes import HASHES_PER_SEGMENT
from data_prep.ledger import Ledger
from data_prep.settings import PrepSettings
from pipeline.data.badmedia import BadReason

# Width over height from which a picture is wide, and up to which it is tall; seconds that 16 and
# 64 frames at 4 a second take.
_ASPECT_BIN = "CASE WHEN width >= 1.25 * height THEN 0 WHEN width > 0.8 * height THEN 1 ELSE 2 END"
_LENGTH_BIN = "CASE WHEN seconds < 4 THEN 0 WHEN seconds < 16 THEN 1 ELSE 2 END"
_BINS = {
    "none": "0",
    "aspect": _ASPECT_BIN,
    "aspect-and-length": f"3 * ({_ASPECT_BIN}) + {_LENGTH_BIN}",
}
# Kept segments that have their shard already come first: shards that are written stay.
_PRECEDENCE = "WHERE original IS NULL ORDER BY shard IS NULL, shard, source, number"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """What one shard holds."""

    number: int
    items: tuple[tuple[str, tuple[str, ...]], ...]
    """Names of finished items and the keys that are taken from each, in order."""


def allocate(ledger: Ledger, settings: PrepSettings) -> int:
    """Leaves duplicates out and gives every other new segment its shard.

    All in one step, so that after a crash it has either happened or not.

    Returns:
        How many shards that made.
    """
    if ledger.count("SELECT count(*) FROM segment WHERE shard IS NULL AND original IS NULL") == 0:
        return 0
    first = ledger.count("SELECT count(*) FROM shard")
    last = first - 1
    database = ledger.database
    database.execute("DROP TABLE IF EXISTS temp.laid")
    database.execute("CREATE TEMP TABLE laid (source TEXT, number INTEGER, shard INTEGER)")
    with database:
        _leave_out_duplicates(ledger, settings)
        for source, number, shard in _allocated(ledger, settings, first):
            database.execute("INSERT INTO temp.laid VALUES (?, ?, ?)", (source, number, shard))
            last = shard
        database.execute(
            "UPDATE segment SET shard = laid.shard FROM temp.laid AS laid "
            "WHERE segment.source = laid.source AND segment.number = laid.number"
        )
        database.executemany(
            "INSERT INTO shard (number) VALUES (?)", ((n,) for n in range(first, last + 1))
        )
    return last + 1 - first


def unfinished_shards(ledger: Ledger) -> Iterator[ShardPlan]:
    """Shards that are allocated and not published."""
    numbers = ledger.database.execute("SELECT number FROM shard WHERE done = 0 ORDER BY number")
    for (number,) in numbers.fetchall():
        items: dict[str, list[str]] = {}
        for item, key in ledger.database.execute(
            "SELECT item, key FROM segment JOIN source ON source.name = segment.source "
            "WHERE shard = ? ORDER BY segment.source, segment.number",
            (number,),
        ):
            items.setdefault(item, []).append(key)
        yield ShardPlan(number=number, items=tuple((i, tuple(keys)) for i, keys in items.items()))


def _leave_out_duplicates(ledger: Ledger, settings: PrepSettings) -> None:
    if settings.duplicates == "keep":
        return
    _mark(ledger, exact_duplicates(_digests(ledger)), BadReason.DUPLICATE)
    if settings.duplicates == "near":
        hashes, sources = _hashes(ledger)
        found = near_duplicates(hashes, sources, settings.near_bits)
        _mark(ledger, found, BadReason.NEAR_DUPLICATE)


def _digests(ledger: Ledger) -> np.ndarray:
    query = f"SELECT sha256 FROM segment {_PRECEDENCE}"  # noqa: S608 - our own words
    count = ledger.count("SELECT count(*) FROM segment WHERE original IS NULL")
    rows = (row[0].encode() for row in ledger.database.execute(query))
    return np.fromiter(rows, dtype="S64", count=count)


def _hashes(ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the kept segments, uint64 [S, 8], and numbers of their sources, int64 [S]."""
    count = ledger.count("SELECT count(*) FROM segment WHERE original IS NULL")
    hashes = np.zeros((count, HASHES_PER_SEGMENT), dtype=np.uint64)
    sources = np.zeros(count, dtype=np.int64)
    query = f"SELECT source, hashes FROM segment {_PRECEDENCE}"  # noqa: S608 - our own words
    for row, (source, text) in enumerate(ledger.database.execute(query)):
        digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
        sources[row] = int.from_bytes(digest, "big", signed=True)
        values = np.frombuffer(bytes.fromhex(text), dtype=">u8")[:HASHES_PER_SEGMENT]
        hashes[row, : len(values)] = values
    return hashes, sources


def _mark(ledger: Ledger, original: np.ndarray, likeness: BadReason) -> None:
    """Notes for every segment that has an original which one it is."""
    database = ledger.database
    for name in ("ranked", "pair"):
        database.execute(f"DROP TABLE IF EXISTS temp.{name}")
    query = f"SELECT source, number, key FROM segment {_PRECEDENCE}"  # noqa: S608 - our own words
    database.execute(f"CREATE TEMP TABLE ranked AS {query}")
    database.execute("CREATE TEMP TABLE pair (later INTEGER PRIMARY KEY, earlier INTEGER)")
    places = np.flatnonzero(original != NONE)
    # Rows of a table count from 1.
    database.executemany(
        "INSERT INTO temp.pair VALUES (?, ?)",
        ((int(place) + 1, int(original[place]) + 1) for place in places),
    )
    database.execute(
        "UPDATE segment SET original = first.key, likeness = ? FROM temp.pair AS pair "
        "JOIN temp.ranked AS again ON again.rowid = pair.later "
        "JOIN temp.ranked AS first ON first.rowid = pair.earlier "
        "WHERE segment.source = again.source AND segment.number = again.number "
        "AND segment.shard IS NULL",
        (str(likeness),),
    )


def _allocated(
    ledger: Ledger, settings: PrepSettings, first: int
) -> Iterator[tuple[str, int, int]]:
    limit = settings.shard_mib * 2**20
    shard, count, num_bytes, bin_before = first - 1, 0, 0, None
    for source, number, size, bin_now in ledger.database.execute(
        f"SELECT source, number, bytes, {_BINS[settings.bins]} AS bin FROM segment "  # noqa: S608
        "WHERE shard IS NULL AND original IS NULL ORDER BY bin, source, number"
    ):
        full = count == settings.samples_per_shard or num_bytes + size > limit
        if shard < first or full or bin_now != bin_before:
            shard, count, num_bytes, bin_before = shard + 1, 0, 0, bin_now
        count, num_bytes = count + 1, num_bytes + size
        yield source, number, shard
