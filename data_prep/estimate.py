"""What a preparation would come to, from a sample of its sources that is prepared for real."""

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from data_prep.driver import Workers, run_items, stopped_by_signal
from data_prep.item import ItemDone, ItemJob
from data_prep.kinds.opening import open_sources
from data_prep.ledger import FOLDER
from data_prep.ledger_file import known_names
from data_prep.prepare import Inputs, PrepProgress, Watch, nothing_found
from data_prep.records import ItemRecord, Source, item_id
from data_prep.settings import PrepSettings
from pipeline.cluster import local_ray

# A fixed seed: the same question gets the same sample.
_SEED = 0
SAMPLE_SOURCES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Figures of the sources that are not done yet, scaled up by their bytes."""

    num_sources: int
    source_bytes: int
    num_known: int
    """Sources that the dataset has already, which cost nothing."""
    num_others: int
    """Files and folders that are no sources."""
    num_sampled: int
    sample_seconds: float
    """Time that one worker is busy with the sample."""
    num_workers: int
    num_samples: int
    hours: float
    shard_bytes: int
    seconds: float
    """Wall time with all workers."""
    rejected: dict[str, int]
    """What was left out of the sample, by reason."""


def estimate(
    inputs: Inputs,
    out: Path,
    settings: PrepSettings,
    *,
    sample: int = SAMPLE_SOURCES,
    workers: Workers | None = None,
    watch: Watch | None = None,
) -> Estimate:
    """Lists all sources, prepares an even sample of those that `out` lacks, and scales up.

    Nothing is written but temporary files, which are gone afterwards.

    Raises:
        UsageError: There is no source, or a table has a mistake.
    """
    watch, workers = watch or Watch(), workers or Workers()
    others: Counter[str] = Counter()
    with known_names(out / FOLDER) as is_known:
        pile = _Pile(size=sample, is_known=is_known)
        found = open_sources(
            inputs.arguments,
            kind=inputs.kind,
            videos=inputs.videos,
            on_other=lambda _name, _reason: others.update(["other"]),
            say=watch.say,
        )
        drawn = pile.drawn_from(found)
        if pile.num_sources == 0:
            raise nothing_found(inputs.arguments, others.total())
        with local_ray(workers.num_cpus, workers.address) as ray, stopped_by_signal():
            num_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
            tried = _tried(ray, drawn, settings, watch)
    scale = pile.todo_bytes / max(1, sum(source.num_bytes for source in drawn))
    segments = [segment for record, _ in tried for segment in record.segments]
    busy = sum(seconds for _, seconds in tried)
    return Estimate(
        num_sources=pile.num_sources,
        source_bytes=pile.num_bytes,
        num_known=pile.num_known,
        num_others=others.total(),
        num_sampled=len(drawn),
        sample_seconds=round(busy, 3),
        num_workers=num_workers,
        num_samples=round(scale * len(segments)),
        hours=round(scale * sum(s.end_seconds - s.start_seconds for s in segments) / 3600, 6),
        shard_bytes=round(scale * sum(segment.num_bytes for segment in segments)),
        seconds=round(scale * busy / num_workers, 3),
        rejected=dict(sorted(Counter(r.reason for t, _ in tried for r in t.rejections).items())),
    )


@dataclass(kw_only=True, slots=True)
class _Pile:
    """All sources in passing: how many, how large, and an even sample of those to be done."""

    size: int
    is_known: Callable[[str], bool]
    num_sources: int = 0
    num_bytes: int = 0
    num_known: int = 0
    todo_bytes: int = 0

    def drawn_from(self, sources: Iterator[Source]) -> list[Source]:
        """Algorithm R (Vitter 1985): each has the same chance, and none but the sample is kept."""
        draw = random.Random(_SEED)
        drawn: list[Source] = []
        for source in sources:
            self.num_sources += 1
            self.num_bytes += source.num_bytes
            if self.is_known(source.name):
                self.num_known += 1
                continue
            self.todo_bytes += source.num_bytes
            place = draw.randrange(self.num_sources - self.num_known)
            if len(drawn) < self.size:
                drawn.append(source)
            elif place < self.size:
                drawn[place] = source
        return drawn


def _tried(
    ray: ModuleType, drawn: list[Source], settings: PrepSettings, watch: Watch
) -> list[tuple[ItemRecord, float]]:
    """The records of some sources and the seconds that their workers took."""
    tried: list[tuple[ItemRecord, float]] = []
    rejected: Counter[str] = Counter()

    def note(done: ItemDone) -> None:
        tried.append((done.record, done.seconds))
        rejected.update(rejection.reason for rejection in done.record.rejections)
        watch.progress(
            PrepProgress(stage="sample", done=len(tried), total=len(drawn), rejected=dict(rejected))
        )

    with tempfile.TemporaryDirectory(prefix="jepa-prep-") as folder:
        run_items(ray, _jobs(drawn, settings, Path(folder)), note)
    return tried


def _jobs(drawn: list[Source], settings: PrepSettings, folder: Path) -> Iterator[ItemJob]:
    text = settings.digest_text()
    for source in drawn:
        item = item_id(source, text)
        yield ItemJob(
            source=source,
            item=item,
            settings=settings,
            result=str(folder / f"{item}.tar"),
            marker=str(folder / item),
        )
