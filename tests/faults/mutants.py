"""Thousands of damaged and hostile videos through real loader workers: none ends the trainer.

The videos are those of `tests/data/videos`, of every codec and container there, mutated in the
worker, so that no checksum stops them before the decoder does: bytes flipped, runs zeroed, parts
cut out, repeated or taken from another file. What a worker dies of is replaced, as in a run.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.clip import MicroBatchPlan
from pipeline.data.clips import LoadClip, make_order
from pipeline.data.decode import DecodeLimits
from pipeline.data.format import ShardIndex
from pipeline.data.indexing import IndexedShard, index_shard, write_index
from pipeline.data.layout import Member
from pipeline.data.loader import CrewStart, Loader
from pipeline.data.settings import DataConfig, Source
from pipeline.masks.collate import collate_plan
from tests.shards import MASKS, grid_of, write_dataset

ROOT = Path(__file__).parents[2]
VIDEOS = ROOT / "tests" / "data" / "videos"
MEMORY_BYTES = 512 << 20
LIMITS = DecodeLimits(max_seconds=5.0, max_memory_bytes=MEMORY_BYTES)
SEED = 11
BATCH, FRAMES, RESOLUTION = 8, 4, 32


@dataclass(frozen=True, kw_only=True, slots=True)
class MutantReport:
    """What became of the mutants."""

    mutants: int
    """Given to the decoder, those tried in place of refused ones included."""
    decoded: int
    refused: dict[str, int]
    """By reason."""
    lost_workers: int
    worker_growth_mib: float
    """The most that a worker's peak of resident memory grew while it decoded."""
    cap_mib: float
    seconds: float


class MutatedIndex(ShardIndex):
    """Reads a mutant in every sample's place; which one, its key alone decides."""

    def read_member(self, record, _member=Member.VIDEO):
        note_growth(self.path)
        return mutant(int(record.key))


def run(count: int, folder: Path, workers: int) -> MutantReport:
    """Loads clips until `count` mutants have been tried."""
    begin = time.monotonic()
    decoded, notices, reasons = 0, 0, Counter()
    with loader_of(write_mutants(folder, count), count, workers) as loader:
        while decoded + reasons.total() < count:
            batch = next(loader)
            decoded += len(batch.keys)
            reasons.update(fault.reason.partition(": ")[0] for fault in batch.faults)
            notices += len(loader.take_notices())
    growth = max(float(path.read_text()) for path in folder.glob("growth-*"))
    return MutantReport(
        mutants=decoded + reasons.total(),
        decoded=decoded,
        refused=dict(reasons.most_common()),
        lost_workers=notices,
        worker_growth_mib=round(growth, 1),
        cap_mib=MEMORY_BYTES / 2**20,
        seconds=round(time.monotonic() - begin, 1),
    )


def run_apart(count: int, workers: int = 2) -> tuple[MutantReport | None, str]:
    """The same in a process of its own; no report if that one dies, which must not happen."""
    # Not by `-m`: workers have to find what is pickled under this module's own name.
    code = "from tests.faults.mutants import main; main()"
    command = [sys.executable, "-c", code, str(count), str(workers)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return MutantReport(**json.loads(done.stdout.splitlines()[-1])), done.stderr


def mutant(number: int) -> bytes:
    """The `number`-th mutant."""
    generator = np.random.default_rng([SEED, number])
    originals = sorted(path for path in VIDEOS.iterdir() if path.is_file())
    content = bytearray(originals[number % len(originals)].read_bytes())
    other = originals[generator.integers(len(originals))].read_bytes()
    # Every other one keeps its headers, so that it comes as far as the decoder.
    begin, end = (len(content) // 4, len(content) * 7 // 10) if number % 2 else (0, len(content))
    middle = content[begin:end]
    for _ in range(generator.integers(1, 4)):
        if middle:
            MUTATIONS[generator.integers(len(MUTATIONS))](middle, other, generator)
    return bytes(content[:begin] + middle + content[end:])


def flip(content: bytearray, _other: bytes, generator: np.random.Generator) -> None:
    for _ in range(generator.integers(1, 30)):
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)


def flip_header(content: bytearray, _other: bytes, generator: np.random.Generator) -> None:
    for _ in range(generator.integers(1, 8)):
        content[generator.integers(min(len(content), 600))] = generator.integers(256)


def zero(content: bytearray, _other: bytes, generator: np.random.Generator) -> None:
    begin, end = part(content, generator)
    content[begin:end] = bytes(end - begin)


def cut(content: bytearray, _other: bytes, generator: np.random.Generator) -> None:
    begin, end = part(content, generator)
    del content[begin:end]


def repeat(content: bytearray, _other: bytes, generator: np.random.Generator) -> None:
    begin, end = part(content, generator)
    content[end:end] = content[begin:end] * 3


def graft(content: bytearray, other: bytes, generator: np.random.Generator) -> None:
    begin, end = part(content, generator)
    content[begin:end] = other[begin:end]


MUTATIONS = (flip, flip_header, zero, cut, repeat, graft)


def part(content: bytearray, generator: np.random.Generator) -> tuple[int, int]:
    begin = int(generator.integers(len(content)))
    return begin, min(len(content), begin + int(generator.integers(1, 5000)))


def note_growth(folder: Path) -> None:
    """Writes down how far this worker's peak of resident memory is above its first clip's."""
    path = folder / f"growth-{os.getpid()}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    first = FIRST_PEAKS.setdefault(os.getpid(), peak)
    path.write_text(str(peak - first))


FIRST_PEAKS: dict[int, float] = {}


def write_mutants(folder: Path, count: int) -> Path:
    """A dataset of twice as many samples as mutants are asked for, all in the same bytes."""
    write_dataset(folder / "set", 2)
    shard = index_shard(folder / "set" / "shard-000000.tar")
    records = np.repeat(shard.records, 2 * count)
    records["key"] = [f"{number:08d}".encode() for number in range(len(records))]
    entry = shard.entry.model_copy(update={"num_samples": len(records)})
    (folder / "set" / "shard-000000.tar").rename(folder / "shard-000000.tar")
    write_index(folder, [IndexedShard(entry=entry, records=records)])
    return folder


def loader_of(folder: Path, count: int, workers: int) -> Loader:
    config = DataConfig(
        sources=(Source(path=str(folder)),),
        workers=workers,
        decode=LIMITS,
        max_substitutes=100,
        max_bad_samples=10 * count,
        max_worker_deaths=8,
    )
    datasets = (MutatedIndex.open(folder),)
    order = make_order(config, datasets, SEED)
    load_clip = LoadClip(config=config, order=order, datasets=datasets)
    plans = tuple(plan_of(number) for number in range(count // BATCH + 1))
    collate = partial(collate_plan, seed=SEED)
    return Loader(CrewStart(load_clip=load_clip, plans=plans, collate=collate, pin=False))


def plan_of(number: int) -> MicroBatchPlan:
    return MicroBatchPlan(
        step=number + 1,
        stage=0,
        first_position=number * BATCH,
        size=BATCH,
        frames=FRAMES,
        fps=4.0,
        resolution=RESOLUTION,
        masks=MASKS,
        grid=grid_of(FRAMES, RESOLUTION),
    )


def main() -> None:
    """`COUNT WORKERS`: prints the report as JSON."""
    count, workers = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        report = run(count, Path(scratch), workers)
    sys.stdout.write(json.dumps(asdict(report)) + "\n")
