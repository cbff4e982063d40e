"""Whether shards are what their manifest says: some of them are read to the end."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

from launch.preflight.finding import Finding, Situation
from pipeline.data.layout import ShardEntry
from pipeline.data.manifest import read_manifest
from pipeline.errors import DataError, ExitCode, JepaError
from pipeline.files import sha256_of

NAME = "shards"
_LONGEST_SECONDS = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    path: Path
    entry: ShardEntry


def check_shards(situation: Situation) -> Finding:
    """Every shard's size, and the digests of as many as can be read in a few seconds.

    Every rank draws others, so that many nodes together see much of a dataset.
    """
    data = situation.config.data
    expected = "every shard as its manifest has it"
    try:
        manifests = [(Path(one.path), read_manifest(Path(one.path))) for one in data.sources]
    except JepaError as error:
        code = ExitCode.CONFIG if isinstance(error, DataError) else error.exit_code
        return Finding(
            name=NAME, state="fail", expected=expected, got=str(error), remedy=error.remedy,
            exit_code=ExitCode.STORAGE if code == ExitCode.STORAGE else ExitCode.CONFIG,
            nodes=(situation.node,),
        )  # fmt: skip
    shards = [
        _Shard(path=folder / entry.name, entry=entry)
        for folder, manifest in manifests
        for entry in manifest.shards
    ]
    damaged = [words for shard in shards if (words := _size_trouble(shard))]
    sampled = 0
    random.Random(situation.launch.rank).shuffle(shards)
    deadline = time.monotonic() + _LONGEST_SECONDS
    for shard in shards:
        if damaged or (sampled and time.monotonic() > deadline):
            break
        situation.note(f"reading {shard.path}")
        sampled += 1
        if sha256_of(shard.path) != shard.entry.sha256:
            damaged.append(f"{shard.path}: its digest differs")
    if damaged:
        return _damaged(situation, expected, damaged)
    got = f"{len(shards)} shards of the right size, {sampled} read to the end"
    return Finding(name=NAME, state="ok", expected=expected, got=got)


def _damaged(situation: Situation, expected: str, damaged: list[str]) -> Finding:
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    tolerated = situation.config.data.on_damaged_shard == "quarantine"
    return Finding(
        name=NAME,
        state="warn" if tolerated else "fail",
        expected=expected,
        got=damaged[0] + more,
        remedy="`jepa prep lint FOLDER` lists all damage; fetch those shards again.",
        nodes=(situation.node,),
    )


def _size_trouble(shard: _Shard) -> str:
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        return f"{shard.path}: {error.strerror}"
    if size != shard.entry.bytes:
        return f"{shard.path}: {size} instead of {shard.entry.bytes} bytes"
    return ""
