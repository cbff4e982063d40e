"""Is a dataset what its manifest says? Bytes, tar structure, index, and clips that decode.

Everything is looked at before anything is said: a person who mends a dataset wants the whole list.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.data.decode import DecodeLimits, probe_media
from pipeline.data.format import BadMediaError, IndexRecord, Manifest, Member, ShardIndex
from pipeline.data.indexing import index_shard
from pipeline.data.layout import INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, SUFFIXES, ShardEntry
from pipeline.data.manifest import file_sha256, read_manifest
from pipeline.data.rawfile import map_records
from pipeline.errors import JepaError

# A rate comes from a duration that is rounded to the container's ticks.
_RATE_TOLERANCE = 0.01
_ARRAYS = (Member.TIMES, Member.STATES, Member.ACTIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as the manifest, the index or the sidecar says."""

    where: str
    """Name of the file, or of the shard and the sample in it."""
    what: str
    """What was expected and what is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LintReport:
    """What a look at a whole dataset came to."""

    dataset: str
    num_shards: int
    num_samples: int
    num_decoded: int
    """Clips that were decoded from end to end."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShardJob:
    dataset: str
    number: int
    every: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShardResult:
    findings: tuple[Finding, ...]
    num_decoded: int


def lint(
    dataset: Path,
    *,
    every: int = 100,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> LintReport:
    """Compares a dataset with its manifest and index, and decodes every `every`-th clip.

    Args:
        dataset: The folder that `jepa prep run` or `jepa prep index` wrote.
        every: Distance of the clips that are decoded; 1 decodes all.
        workers: Processes that share the shards.
        on_progress: Called with the shards done and all shards.

    Raises:
        UsageError: There is no manifest, or it is of another schema version.
        DataError: The manifest or the index cannot be read at all.
    """
    manifest = read_manifest(dataset)
    findings = list(_folder_findings(dataset, manifest))
    jobs = [
        _ShardJob(dataset=str(dataset), number=number, every=every)
        for number in range(len(manifest.shards))
    ]
    num_decoded = 0
    for done, result in enumerate(_results(jobs, workers), start=1):
        findings += result.findings
        num_decoded += result.num_decoded
        if on_progress is not None:
            on_progress(done, len(jobs))
    return LintReport(
        dataset=str(dataset),
        num_shards=len(manifest.shards),
        num_samples=manifest.num_samples,
        num_decoded=num_decoded,
        findings=tuple(sorted(set(findings), key=lambda finding: (finding.where, finding.what))),
    )


def _results(jobs: Sequence[_ShardJob], workers: int) -> Iterator[_ShardResult]:
    if workers <= 1 or len(jobs) <= 1:
        yield from map(_lint_shard, jobs)
        return
    # Spawned: FFmpeg and torch keep threads, which a fork would copy half-alive.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(_lint_shard, job) for job in jobs]):
            yield future.result()


def _folder_findings(dataset: Path, manifest: Manifest) -> Iterator[Finding]:
    index = dataset / INDEX_NAME
    if file_sha256(index) != manifest.index_sha256:
        yield Finding(where=INDEX_NAME, what=f"its SHA-256 is not the one in {MANIFEST_NAME}")
    records = map_records(index)
    if len(records) != manifest.num_samples:
        what = f"{len(records)} samples, {MANIFEST_NAME} names {manifest.num_samples}"
        yield Finding(where=INDEX_NAME, what=what)
    keys, counts = np.unique(records["key"], return_counts=True)
    for key in keys[counts > 1].tolist():
        yield Finding(where=INDEX_NAME, what=f"key {_text(key)} occurs more than once")
    known = {shard.name for shard in manifest.shards}
    for path in sorted(dataset.glob("*.tar")):
        if path.name not in known:
            what = f"not in {MANIFEST_NAME}: an unfinished preparation, or a file of another one"
            yield Finding(where=path.name, what=what)


def _lint_shard(job: _ShardJob) -> _ShardResult:
    dataset = Path(job.dataset)
    manifest = read_manifest(dataset)
    entry = manifest.shards[job.number]
    records = map_records(dataset / INDEX_NAME)
    own = np.flatnonzero(records["shard"] == job.number)
    # Tars of others hold members that are none of ours; their digests have to do.
    is_ours = Member.SIDECAR in manifest.members
    known = records[own] if is_ours else None
    findings = list(_structure_findings(dataset / entry.name, entry, known))
    if not (dataset / entry.name).is_file():
        return _ShardResult(findings=tuple(findings), num_decoded=0)
    index = ShardIndex(path=dataset, manifest=manifest, records=records)
    chosen = [int(sample) for sample in own if sample % job.every == 0]
    for sample in chosen:
        record = index.record(sample)
        where = f"{entry.name}: {record.key}"
        try:
            problems = list(_sample_problems(index, record))
        except (BadMediaError, JepaError) as error:
            problems = [str(error)]
        findings += [Finding(where=where, what=problem) for problem in problems]
    index.close()
    return _ShardResult(findings=tuple(findings), num_decoded=len(chosen))


def _structure_findings(
    path: Path, entry: ShardEntry, records: np.ndarray | None
) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding(where=entry.name, what="missing")
        return
    try:
        found = None if records is None else index_shard(path)
    except JepaError as error:
        yield Finding(where=entry.name, what=str(error).removeprefix(f"{path}: "))
        found = None
    size, digest = path.stat().st_size, file_sha256(path)
    if size != entry.bytes:
        yield Finding(where=entry.name, what=f"{size} bytes, {MANIFEST_NAME} names {entry.bytes}")
    elif digest != entry.sha256:
        yield Finding(where=entry.name, what=f"its SHA-256 is not the one in {MANIFEST_NAME}")
    if found is not None and records is not None:
        yield from _index_findings(entry.name, found.records, records)


def _index_findings(shard: str, found: np.ndarray, indexed: np.ndarray) -> Iterator[Finding]:
    if len(found) != len(indexed):
        what = f"holds {len(found)} samples, {INDEX_NAME} names {len(indexed)}"
        yield Finding(where=shard, what=what)
        return
    columns = [name for name in INDEX_DTYPE.names or () if name != "shard"]
    for column in columns:
        wrong = np.flatnonzero(found[column] != indexed[column])
        if len(wrong):
            key = _text(found["key"].tolist()[wrong[0]])
            what = f"{INDEX_NAME} differs in {column} of {len(wrong)} samples, first {key}"
            yield Finding(where=shard, what=what)


def _sample_problems(index: ShardIndex, record: IndexRecord) -> Iterator[str]:
    """What the index says of a sample against what decodes."""
    info = probe_media(index.read_member(record), DecodeLimits(), decode_everything=True)
    if info.partial is not None:
        yield f"decodes to {info.duration_seconds:.3f} s only: {info.partial}"
    said = replace(record, places=())
    expected = (said.num_frames, said.width, said.height, said.codec)
    codec = info.codec if said.codec != "other" else "other"
    real = (info.num_frames, info.width, info.height, codec)
    names = ("frames", "pixels wide", "pixels high", "codec")
    for name, wanted, got in zip(names, expected, real, strict=True):
        if wanted != got:
            yield f"{name}: {INDEX_NAME} names {wanted}, {got} decode"
    if info.num_frames > 1 and abs(info.fps - said.fps) > _RATE_TOLERANCE * said.fps:
        yield f"frames a second: {INDEX_NAME} names {said.fps:g}, {info.fps:g} decode"
    if record.place(Member.SIDECAR).length > 0:
        index.read_sidecar(record)
    yield from _companion_problems(index, record)


def _companion_problems(index: ShardIndex, record: IndexRecord) -> Iterator[str]:
    rows = {
        member: len(index.read_array(record, member))
        for member in _ARRAYS
        if record.place(member).length > 0
    }
    times = rows.pop(Member.TIMES, None)
    for member, count in rows.items():
        # Actions lie between states, so there may be one less than times.
        if times is not None and count not in (times, times - 1):
            yield f"{SUFFIXES[member]} has {count} rows for {times} times"
    if record.place(Member.CAPTIONS).length > 0:
        index.read_captions(record)


def _text(key: bytes) -> str:
    return key.decode("ascii", "backslashreplace")
