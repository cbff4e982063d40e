"""Videos → a dataset: the whole preparation, top to bottom."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.driver import Workers, run_parts
from data_prep.ledger import Ledger, PartRecord
from data_prep.part import PartJob, PartReport
from data_prep.settings import PrepSettings
from data_prep.sources import inputs_digest, list_sources, partition
from pipeline.data.indexing import write_index
from pipeline.data.layout import REJECTED_NAME, Manifest
from pipeline.data.manifest import write_durably
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepProgress:
    """Where a preparation stands. Numbers are of source videos."""

    done: int
    total: int
    rejected: dict[str, int]
    """Videos refused or partial, by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepReport:
    """What a preparation came to."""

    dataset: str
    digest: str
    num_sources: int
    num_ignored: int
    """Files that were no videos by their suffix."""
    num_samples: int
    hours: float
    num_shards: int
    shard_bytes: int
    source_bytes: int
    num_kept_shards: int
    """Shards that an earlier run had finished."""
    rejected: dict[str, int]


def prepare(
    roots: Sequence[Path],
    out: Path,
    settings: PrepSettings,
    *,
    workers: Workers | None = None,
    overwrite: bool = False,
    on_progress: Callable[[PrepProgress], None] | None = None,
) -> PrepReport:
    """Prepares the videos below `roots` into the dataset folder `out`, or finishes doing so.

    The same sources and settings give the same bytes, however often the work was interrupted
    and whoever did it.

    Raises:
        UsageError: There is no video, or `out` holds another dataset.
        DataError: No video could be used.
        StorageError: `out` cannot be written.
    """
    found = list_sources(roots)
    ledger = Ledger(out)
    ledger.begin(found.sources, settings, overwrite=overwrite)
    records: dict[int, PartRecord] = {}
    jobs: list[PartJob] = []
    for number, sources in enumerate(partition(found.sources, settings)):
        record = ledger.read(number, inputs_digest(sources, settings))
        if record is None:
            job = PartJob(number=number, sources=sources, settings=settings, dataset_dir=str(out))
            jobs.append(job)
        else:
            records[number] = record
    num_kept = sum(record.shard is not None for record in records.values())

    def show() -> None:
        if on_progress is not None:
            on_progress(_progress(records, len(found.sources)))

    def note(report: PartReport) -> None:
        records[report.number] = report.record
        show()

    show()
    run_parts(jobs, workers or Workers(), note)
    ordered = [records[number] for number in sorted(records)]
    manifest = _publish(ledger, settings, ordered)
    return PrepReport(
        dataset=str(out),
        digest=manifest.digest,
        num_sources=len(found.sources),
        num_ignored=found.num_ignored,
        num_samples=manifest.num_samples,
        hours=manifest.hours,
        num_shards=len(manifest.shards),
        shard_bytes=sum(shard.bytes for shard in manifest.shards),
        source_bytes=sum(source.num_bytes for source in found.sources),
        num_kept_shards=num_kept,
        rejected=_by_reason(ordered),
    )


def _progress(records: dict[int, PartRecord], total: int) -> PrepProgress:
    return PrepProgress(
        done=sum(record.num_sources for record in records.values()),
        total=total,
        rejected=_by_reason(records.values()),
    )


def _by_reason(records: Iterable[PartRecord]) -> dict[str, int]:
    counts = Counter(rejection.reason for record in records for rejection in record.rejections)
    return dict(sorted(counts.items()))


def _publish(ledger: Ledger, settings: PrepSettings, records: Sequence[PartRecord]) -> Manifest:
    """Writes what is not a shard; the manifest last, because it declares the dataset finished."""
    lines = [
        json.dumps(rejection.model_dump(), ensure_ascii=False)
        for record in records
        for rejection in record.rejections
    ]
    rejected = ledger.dataset_dir / REJECTED_NAME
    write_durably(rejected, "".join(f"{line}\n" for line in lines).encode())
    shards = [
        ledger.indexed(number, record.shard)
        for number, record in enumerate(records)
        if record.shard is not None
    ]
    if not shards:
        raise DataError(
            f"none of {sum(record.num_sources for record in records)} videos could be used: "
            f"{_by_reason(records)}",
            remedy=f"{rejected} has a line per video with the reason.",
        )
    return write_index(ledger.dataset_dir, shards, settings.as_json())
