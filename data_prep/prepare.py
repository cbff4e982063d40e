"""Sources → a dataset: the whole preparation, top to bottom."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from data_prep.allocation import ShardPlan, allocate, unfinished_shards
from data_prep.driver import Workers, run_items, run_shards, stopped_by_signal
from data_prep.item import ItemJob, read_record
from data_prep.kinds.opening import Kind, open_sources
from data_prep.ledger import Ledger, Listed
from data_prep.pack import ShardJob
from data_prep.publication import publish_dataset, published
from data_prep.records import ItemRecord, Source
from data_prep.settings import PrepSettings
from data_prep.upkeep import clear_leftovers, remove_all_items, remove_packed, reopen_lost
from pipeline.cluster import local_ray
from pipeline.data.layout import Manifest
from pipeline.errors import UsageError

# Not each by itself: a lost note costs a look at a file, and no work.
_NOTES_PER_COMMIT = 64
_LISTED_PER_SHOW = 1000

Stage = Literal["listing", "sources", "shards", "sample"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What is prepared, in the words of the command."""

    arguments: tuple[str, ...]
    """Paths or addresses, each of which may begin with `kind:`."""
    kind: Kind | None = None
    """What those are that do not say it themselves; recognised if left out."""
    videos: str | None = None
    """Folder or address that relative paths in tables start from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepProgress:
    """Where a stage of a preparation stands."""

    stage: Stage
    done: int
    total: int | None
    """Not known while sources are listed."""
    rejected: dict[str, int]
    """Sources and parts of them that are left out, by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Who is told what, while a preparation goes on."""

    progress: Callable[[PrepProgress], None] = lambda _progress: None
    say: Callable[[str], None] = lambda _line: None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepReport:
    """What a preparation came to."""

    dataset: str
    digest: str
    num_sources: int
    """In all, those of earlier runs included."""
    num_new_sources: int
    """Those that this run was the first to be given."""
    num_prepared: int
    """Those that this run worked on."""
    num_others: int
    """Files and folders that were found and are no sources."""
    num_samples: int
    hours: float
    num_shards: int
    num_new_shards: int
    """Those that this run wrote."""
    shard_bytes: int
    source_bytes: int
    rejected: dict[str, int]


def prepare(
    inputs: Inputs,
    out: Path,
    settings: PrepSettings,
    *,
    workers: Workers | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> PrepReport:
    """Prepares sources into the dataset folder `out`, continues doing so, or appends to it.

    The same sources and settings give the same bytes, however often the work was interrupted
    and whoever did it. Sources that a finished dataset does not have yet become further shards.

    Raises:
        UsageError: There is no source, or `out` holds another dataset.
        DataError: No source could be used.
        StorageError: `out` cannot be written.
        Stopped: On SIGTERM; what is finished is kept.
    """
    with (
        stopped_by_signal(),
        Ledger.open(out, settings, overwrite=overwrite) as ledger,
    ):
        return _Work(ledger, settings, watch or Watch()).do(inputs, workers or Workers())


def nothing_found(arguments: Sequence[str], num_others: int) -> UsageError:
    """The error that no argument gave a source."""
    return UsageError(
        f"no source found in {', '.join(arguments)[:1000] or 'nothing'} ({num_others} other files)",
        remedy="Name folders with videos, or the video files themselves.",
    )


class _Work:
    """One preparation that is under way."""

    def __init__(self, ledger: Ledger, settings: PrepSettings, watch: Watch) -> None:
        self._ledger, self._settings, self._watch = ledger, settings, watch
        self._rejected: Counter[str] = Counter()

    def do(self, inputs: Inputs, workers: Workers) -> PrepReport:
        """Lists, prepares, packs, publishes."""
        ledger = self._ledger
        listed = self._list(inputs)
        clear_leftovers(ledger)
        reopen_lost(ledger)
        self._rejected.update(ledger.rejected_by_reason())
        todo = ledger.count("SELECT count(*) FROM source WHERE done = 0")
        shards_before = ledger.count("SELECT count(*) FROM shard WHERE done = 1")
        if self._is_unfinished():
            # Again inside, because Ray puts a handler of its own in the place of ours.
            with local_ray(workers.num_cpus, workers.address) as ray, stopped_by_signal():
                self._prepare_items(ray)
                allocate(ledger, self._settings)
                self._pack(ray)
        is_done = todo == 0 and listed.num_new == 0 and shards_before == self._num_shards()
        manifest = published(ledger) if is_done else None
        if manifest is None:
            manifest = publish_dataset(ledger, self._settings, self._watch.say)
        remove_all_items(ledger)
        return self._report(listed, manifest, todo, shards_before)

    def _list(self, inputs: Inputs) -> Listed:
        found = open_sources(
            inputs.arguments,
            kind=inputs.kind,
            videos=inputs.videos,
            on_other=self._ledger.add_other,
            say=self._watch.say,
        )
        listed = self._ledger.add_sources(self._counted(found), self._settings)
        self._show("listing", listed.num_sources, listed.num_sources)
        if listed.num_sources == 0:
            others = self._ledger.count("SELECT count(*) FROM other")
            raise nothing_found(inputs.arguments, others)
        return listed

    def _counted(self, sources: Iterable[Source]) -> Iterator[Source]:
        for number, source in enumerate(sources):
            if number % _LISTED_PER_SHOW == 0:
                self._show("listing", number, None)
            yield source

    def _is_unfinished(self) -> bool:
        return any(
            self._ledger.count(f"SELECT EXISTS (SELECT 1 FROM {what})")  # noqa: S608 - our words
            for what in (
                "source WHERE done = 0",
                "segment WHERE shard IS NULL AND original IS NULL",
                "shard WHERE done = 0",
            )
        )

    def _prepare_items(self, ray: ModuleType) -> None:
        done = self._ledger.count("SELECT count(*) FROM source WHERE done = 1")
        total = self._ledger.count("SELECT count(*) FROM source")

        def note_record(record: ItemRecord) -> None:
            nonlocal done
            done += 1
            self._ledger.note(record)
            if done % _NOTES_PER_COMMIT == 0:
                self._ledger.database.commit()
            self._rejected.update(str(rejection.reason) for rejection in record.rejections)
            self._show("sources", done, total)

        self._show("sources", done, total)
        run_items(ray, self._item_jobs(note_record), lambda one: note_record(one.record))
        self._ledger.database.commit()

    def _item_jobs(self, note: Callable[[ItemRecord], None]) -> Iterator[ItemJob]:
        """Work that is not done; what a driver that died had not noted is noted on the way."""
        for source, item in self._ledger.pending():
            result = self._ledger.item_path(item)
            there = read_record(result)
            if there is not None:
                note(there)
                continue
            yield ItemJob(
                source=source,
                item=item,
                settings=self._settings,
                result=str(result),
                marker=str(self._ledger.marker_path(item)),
            )

    def _pack(self, ray: ModuleType) -> None:
        total = self._ledger.count("SELECT count(*) FROM shard")
        done = self._num_shards()

        def note(number: int) -> None:
            nonlocal done
            done += 1
            with self._ledger.database as database:
                database.execute("UPDATE shard SET done = 1 WHERE number = ?", (number,))
            remove_packed(self._ledger, number)
            self._show("shards", done, total)

        self._rejected = Counter(self._ledger.rejected_by_reason())
        self._show("shards", done, total)
        run_shards(ray, map(self._shard_job, unfinished_shards(self._ledger)), note)

    def _shard_job(self, plan: ShardPlan) -> ShardJob:
        return ShardJob(
            number=plan.number,
            items=tuple((str(self._ledger.item_path(item)), keys) for item, keys in plan.items),
            shard=str(self._ledger.shard_path(plan.number)),
            rows=str(self._ledger.shard_rows(plan.number)),
        )

    def _num_shards(self) -> int:
        return self._ledger.count("SELECT count(*) FROM shard WHERE done = 1")

    def _report(
        self, listed: Listed, manifest: Manifest, prepared: int, shards_before: int
    ) -> PrepReport:
        ledger = self._ledger
        return PrepReport(
            dataset=str(ledger.dataset_dir),
            digest=manifest.digest,
            num_sources=ledger.count("SELECT count(*) FROM source"),
            num_new_sources=listed.num_new,
            num_prepared=prepared,
            num_others=ledger.count("SELECT count(*) FROM other"),
            num_samples=manifest.num_samples,
            hours=manifest.hours,
            num_shards=len(manifest.shards),
            num_new_shards=len(manifest.shards) - shards_before,
            shard_bytes=sum(shard.bytes for shard in manifest.shards),
            source_bytes=ledger.count("SELECT sum(bytes) FROM source"),
            rejected=ledger.rejected_by_reason(),
        )

    def _show(self, stage: Stage, done: int, total: int | None) -> None:
        self._watch.progress(
            PrepProgress(
                stage=stage,
                done=done,
                total=total,
                rejected=dict(sorted(self._rejected.items())),
            )
        )
