"""`jepa prep index`: a folder of tars of others becomes a dataset; the tars stay as they are."""

import json as json_text
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.foreign import ForeignShard, index_foreign_shard, index_key
from data_prep.records import Rejection
from pipeline.data.indexing import IndexedShard, write_index
from pipeline.data.layout import MANIFEST_NAME, REJECTED_NAME, SHARD_PATTERN, Manifest, Member
from pipeline.data.manifest import read_manifest, write_durably
from pipeline.errors import DataError, StorageError, UsageError

_MARK = "foreign"
_MAX_DEATHS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """What indexing a folder of tars came to."""

    dataset: str
    digest: str
    num_shards: int
    num_samples: int
    hours: float
    members: tuple[str, ...]
    ignored: dict[str, int]
    """Members without use for the loader, by suffix."""
    rejected: dict[str, int]
    """Samples left out, by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    path: Path
    marker: Path
    decode_everything: bool
    deadly: frozenset[str] = frozenset()


def index(
    dataset: Path,
    *,
    out: Path | None = None,
    decode: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Index WebDataset tars that others wrote, so that `jepa train` reads them as they are.

    Writes index.npy, manifest.json and rejected.jsonl; samples without a video that opens are left
    out and named there.

    Args:
        dataset: Folder with the tars; the index goes there too, unless --out is given.
        out: Folder for the index and for links to the tars, if DATASET is not to be written to.
        decode: Decode every video to its end; else the first frame, and the packets are counted.
        workers: Processes that share the tars.
        overwrite: Index again what has been indexed.
        json: Print the result as JSON.
    """
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    with Progress(
        TextColumn("indexing tars"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task("tars", total=None)
        report = index_tars(
            dataset,
            out or dataset,
            decode_everything=decode,
            workers=workers,
            overwrite=overwrite,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json:
        Console().print_json(json_text.dumps(asdict(report)))
        return
    Console().print(_summary(report), soft_wrap=True, highlight=False, markup=False)


def index_tars(
    folder: Path,
    out: Path,
    *,
    decode_everything: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> IndexReport:
    """Indexes the tars of a folder; the same tars give the same index.

    Raises:
        UsageError: There is no tar, a name is not fit for a shard, or `out` is a dataset already.
        DataError: A tar is damaged, or no sample can be used.
        StorageError: A folder cannot be read or written.
    """
    tars = _tars(folder, out, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [
            _Job(path=path, marker=Path(scratch) / str(n), decode_everything=decode_everything)
            for n, path in enumerate(tars)
        ]
        found: dict[Path, ForeignShard] = {}
        for path, shard in _results(jobs, workers):
            found[path] = shard
            on_progress(len(found), len(jobs))
    shards = [found[path] for path in tars]
    manifest = _publish(out, shards)
    return IndexReport(
        dataset=str(out),
        digest=manifest.digest,
        num_shards=len(shards),
        num_samples=manifest.num_samples,
        hours=manifest.hours,
        members=manifest.members,
        ignored=dict(sorted(sum((Counter(one.ignored) for one in shards), Counter()).items())),
        rejected=dict(Counter(r.reason for one in shards for r in one.rejections)),
    )


def _tars(folder: Path, out: Path, *, overwrite: bool) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", remedy="Name the folder with the tars.")
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        raise UsageError(
            f"{folder}: no *.tar in this folder",
            remedy="Name the folder with the tars; compressed ones have to be unpacked (gunzip).",
        )
    if (out / MANIFEST_NAME).exists() and not overwrite:
        ours = _MARK not in read_manifest(out).preparation
        origin = "which `jepa prep run` wrote" if ours else "indexed before"
        raise UsageError(
            f"{out} is a dataset already, {origin}",
            remedy="Train on it as it is, or index it again with --overwrite.",
        )
    if out.resolve() != folder.resolve():
        return _linked(tars, out)
    if unfit := [path.name for path in tars if not SHARD_PATTERN.fullmatch(path.name)]:
        raise UsageError(
            f"{folder}: {len(unfit)} tars have names that are not fit for shards, such as "
            f"{unfit[0]!r}; letters, digits, _ and - are",
            remedy="Give --out FOLDER: links with fitting names are made there.",
        )
    return tars


def _linked(tars: Sequence[Path], out: Path) -> list[Path]:
    links, fit = [], all(SHARD_PATTERN.fullmatch(path.name) for path in tars)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(tars):
            link = out / (path.name if fit else f"shard-{number:06d}.tar")
            if link.is_symlink():
                link.unlink()
            link.symlink_to(path.resolve())
            links.append(link)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}") from error
    return links


def _results(jobs: Sequence[_Job], workers: int) -> Iterator[tuple[Path, ForeignShard]]:
    """Shards as they are done; those at work when a process died are done again, one at a time."""
    left = {job.path: job for job in jobs}
    try:
        with _pool(min(workers, len(jobs))) as pool:
            tasks = {pool.submit(_index, job): job for job in jobs}
            for task in as_completed(tasks):
                shard = task.result()
                del left[tasks[task].path]
                yield tasks[task].path, shard
    except BrokenProcessPool:
        pass
    for job in left.values():
        yield job.path, _one_by_one(job)


def _one_by_one(job: _Job) -> ForeignShard:
    key = ""
    for _ in range(_MAX_DEATHS):
        try:
            with _pool(1) as pool:
                return pool.submit(_index, job).result()
        except BrokenProcessPool:
            # The sample at which it died, if it came to one.
            key = job.marker.read_text() if job.marker.exists() else ""
            job = replace(job, deadly=job.deadly | {key})
    raise DataError(
        f"{job.path}: processes died of it {_MAX_DEATHS} times, last at {key!r}",
        remedy="Look for a lack of memory, or leave this tar out.",
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned: FFmpeg and torch keep threads, which a fork would copy half-alive.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _index(job: _Job) -> ForeignShard:
    try:
        return index_foreign_shard(
            job.path,
            decode_everything=job.decode_everything,
            deadly=job.deadly,
            note=lambda key: _note(job.marker, key),
        )
    except OSError as error:
        raise StorageError(f"{job.path}: cannot be read: {error.strerror or error}") from error


def _note(marker: Path, key: str) -> None:
    marker.write_text(key, errors="surrogateescape")


def _publish(out: Path, shards: Sequence[ForeignShard]) -> Manifest:
    rejections = [rejection for shard in shards for rejection in shard.rejections]
    _write_rejected(out, rejections)
    indexed = [shard.indexed for shard in shards]
    if not any(len(shard.records) for shard in indexed):
        raise DataError(
            f"{out}: no sample in {len(shards)} tars can be used",
            remedy=f"{out / REJECTED_NAME} has a line per sample with the reason.",
        )
    forms = frozenset().union(*(shard.captions for shard in shards))
    # A reader has to know the form beforehand; lists with times say more than plain texts.
    only_text = forms == {"text"}
    if len(forms) > 1:
        indexed = [_without_text(shard) for shard in shards]
    return write_index(
        out, _with_unique_keys(indexed), {_MARK: True}, captions="text" if only_text else "json"
    )


def _without_text(shard: ForeignShard) -> IndexedShard:
    if shard.captions == {"json"}:
        return shard.indexed
    if len(shard.captions) > 1:
        raise DataError(
            f"{shard.indexed.entry.name}: some samples have captions.json and some .txt alone",
            remedy="Give all samples of a tar captions of one form.",
        )
    records = shard.indexed.records.copy()
    records[str(Member.CAPTIONS)] = 0
    return replace(shard.indexed, records=records)


def _with_unique_keys(shards: Sequence[IndexedShard]) -> list[IndexedShard]:
    keys = [shard.records["key"] for shard in shards]
    found, counts = np.unique(np.concatenate(keys), return_counts=True)
    twice = set(found[counts > 1].tolist())
    if not twice:
        return list(shards)
    changed = []
    for shard in shards:
        records = shard.records.copy()
        for number, key in enumerate(records["key"].tolist()):
            if key in twice:
                name = index_key(shard.entry.name, key.decode("ascii"), unique=True)
                records["key"][number] = name.encode("ascii")
        changed.append(replace(shard, records=records))
    return changed


def _write_rejected(out: Path, rejections: Sequence[Rejection]) -> None:
    text = "".join(f"{one.model_dump_json(exclude_none=True)}\n" for one in rejections)
    write_durably(out / REJECTED_NAME, text.encode())


def _summary(report: IndexReport) -> str:
    lines = [
        f"{report.dataset}: {report.num_samples} samples, {report.hours:.3f} hours in "
        f"{report.num_shards} tars; every sample has {', '.join(report.members)}",
        f"digest: {report.digest}",
    ]
    if report.ignored:
        kinds = ", ".join(f".{suffix} {count}" for suffix, count in report.ignored.items())
        lines.append(f"members that training does not read: {kinds}")
    if report.rejected:
        kinds = ", ".join(f"{reason} {count}" for reason, count in report.rejected.items())
        lines.append(f"left out: {kinds}; {report.dataset}/{REJECTED_NAME} names them")
    return "\n".join(lines)
