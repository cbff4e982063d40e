"""What a preparation has to do and has done: one database and one file per finished source.

All lies in the hidden folder `.prep` of the dataset. A source's work is done when its file in
`items` is there, which is written whole or not at all by whoever did it. The database is the
driver's own: the list of sources in order, what became of each, and which segment goes into which
shard. It is only ever behind the files, so losing its last moments costs nothing; and since it
sorts and counts on disk, a million sources need no more memory than a hundred.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.ledger_file import claimed_database
from data_prep.records import ItemRecord, Rejection, Source, item_id
from data_prep.settings import PrepSettings
from pipeline.data.badmedia import BadReason
from pipeline.errors import UsageError

FOLDER = ".prep"
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """What listing the sources came to."""

    num_sources: int
    num_new: int
    """Those that the dataset did not have yet."""


class Ledger:
    """The hidden folder of one dataset; one process at a time holds it, until `open` ends."""

    def __init__(self, dataset_dir: Path, database: sqlite3.Connection) -> None:
        self.dataset_dir = dataset_dir
        self.folder = dataset_dir / FOLDER
        self.database = database

    @classmethod
    @contextmanager
    def open(
        cls, dataset_dir: Path, settings: PrepSettings, *, overwrite: bool = False
    ) -> Iterator["Ledger"]:
        """Claims a dataset's folder, or continues with what is there.

        Raises:
            UsageError: The folder holds something else, was prepared with other settings, or
                another process is at work in it.
            StorageError: It cannot be written.
        """
        with claimed_database(dataset_dir, dataset_dir / FOLDER, overwrite=overwrite) as database:
            ledger = cls(dataset_dir, database)
            ledger._check_settings(settings)
            yield ledger

    def item_path(self, item: str) -> Path:
        """Where the finished work of a source lies until it is packed."""
        return self.folder / "items" / item[:2] / f"{item}.tar"

    def marker_path(self, item: str) -> Path:
        """There while a worker is at a source; holds the worker's process number."""
        return self.folder / "running" / item

    def shard_path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.dataset_dir / f"shard-{number:06d}.tar"

    def shard_rows(self, number: int) -> Path:
        """Where the index's rows of a published shard lie; its entry beside it as `.json`."""
        return self.folder / "shards" / f"shard-{number:06d}.npy"

    def add_sources(self, sources: Iterable[Source], settings: PrepSettings) -> Listed:
        """Takes in all sources, or none if anything is wrong with them.

        Raises:
            UsageError: Two sources have one name, or a known name now stands for another file.
        """
        text = settings.digest_text()
        new = total = 0
        self.database.execute("DROP TABLE IF EXISTS temp.named")
        self.database.execute(
            "CREATE TEMP TABLE named (name TEXT PRIMARY KEY, place TEXT NOT NULL) WITHOUT ROWID"
        )
        with self.database:
            for source in sources:
                if self._is_first(source):
                    total += 1
                    new += self._add(source, item_id(source, text))
        return Listed(num_sources=total, num_new=new)

    def add_other(self, name: str, reason: str) -> None:
        """Notes a file or folder that was found and is no source."""
        self.database.execute("INSERT OR REPLACE INTO other VALUES (?, ?)", (name, reason))

    def pending(self) -> Iterator[tuple[Source, str]]:
        """Sources that are not done and their items, by name, read as they are asked for."""
        last: str | None = ""
        while last is not None:
            rows = self.database.execute(
                "SELECT name, item, spec FROM source WHERE done = 0 AND name > ? "
                "ORDER BY name LIMIT ?",
                (last, _ROWS_AT_A_TIME),
            ).fetchall()
            for _, item, spec in rows:
                yield Source.from_json(spec), item
            last = rows[-1][0] if rows else None

    def note(self, record: ItemRecord) -> None:
        """Takes in what became of a source; a segment keeps the shard it was given before."""
        self.database.execute(
            "UPDATE source SET done = 1, record = ? WHERE name = ?",
            (record.model_dump_json(exclude_defaults=True), record.source),
        )
        self.database.execute("DELETE FROM rejection WHERE source = ?", (record.source,))
        self.database.executemany(
            "INSERT INTO rejection VALUES (?, ?, ?, ?)",
            [
                (record.source, number, str(rejection.reason), rejection.model_dump_json())
                for number, rejection in enumerate(record.rejections)
            ],
        )
        self.database.executemany(
            "INSERT INTO segment (source, number, key, bytes, seconds, width, height, sha256, "
            "hashes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [
                (
                    record.source, s.number, s.key, s.num_bytes, s.end_seconds - s.start_seconds,
                    s.width, s.height, s.content_sha256, "".join(s.figures.hashes),
                )
                for s in record.segments
            ],
        )  # fmt: skip

    def records(self) -> Iterator[ItemRecord]:
        """What became of every source that is done, by name, with the segments that are kept."""
        rows = self.database.execute(
            "SELECT record, (SELECT group_concat(number) FROM segment WHERE source = name AND "
            "original IS NOT NULL) FROM source WHERE done = 1 ORDER BY name"
        )
        for text, left_out in rows:
            record = ItemRecord.model_validate_json(text)
            if left_out is None:
                yield record
                continue
            numbers = {int(number) for number in left_out.split(",")}
            kept = tuple(one for one in record.segments if one.number not in numbers)
            yield record.model_copy(update={"segments": kept})

    def rejections(self) -> Iterator[Rejection]:
        """All that was found and is not in the dataset, by source."""
        query = (
            "SELECT source, 0, number, line, NULL, 0 FROM rejection UNION ALL "
            "SELECT source, 1, number, likeness, original, (SELECT count(*) FROM segment AS kept "
            "WHERE kept.source = segment.source AND kept.original IS NULL) FROM segment "
            "WHERE original IS NOT NULL UNION ALL "
            "SELECT name, 2, 0, reason, NULL, 0 FROM other ORDER BY 1, 2, 3"
        )
        for source, what, number, text, original, kept in self.database.execute(query):
            if what == 0:
                yield Rejection.model_validate_json(text)
            elif what == 1:
                detail = f"segment {number} is like {original}"
                yield Rejection(source=source, reason=text, detail=detail, kept_samples=kept)
            else:
                yield Rejection(source=source, reason=other_reason(text), detail=text)

    def rejected_by_reason(self) -> dict[str, int]:
        """How many sources, and parts of sources, are left out and why, by reason."""
        query = (
            "SELECT reason, count(*) FROM rejection GROUP BY reason UNION ALL "
            "SELECT likeness, count(*) FROM segment WHERE original IS NOT NULL GROUP BY likeness "
            "ORDER BY 1"
        )
        return dict(self.database.execute(query))

    def count(self, query: str) -> int:
        """A number out of the database."""
        return int(self.database.execute(query).fetchone()[0] or 0)

    def _is_first(self, source: Source) -> bool:
        """Whether a source comes up for the first time now; a second of its name is refused."""
        # As JSON, because a path may hold bytes that are no text.
        place = json.dumps([source.locator, source.member_offset])
        if self.database.execute(
            "INSERT INTO temp.named VALUES (?, ?) ON CONFLICT DO NOTHING", (source.name, place)
        ).rowcount:
            return True
        query = "SELECT place FROM temp.named WHERE name = ?"
        earlier = self.database.execute(query, (source.name,)).fetchone()[0]
        if earlier == place:
            return False
        raise UsageError(
            f"two sources would both be called {source.name[:300]!r}: {earlier[:300]} and "
            f"{place[:300]}",
            remedy="Give their common parent folder as the source instead.",
        )

    def _add(self, source: Source, item: str) -> bool:
        text = source.to_json()
        added = self.database.execute(
            "INSERT INTO source (name, item, spec, bytes) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (name) DO NOTHING",
            (source.name, item, text, source.num_bytes),
        ).rowcount
        if added:
            self.database.execute("DELETE FROM other WHERE name = ?", (source.name,))
            return True
        there, spec = self.database.execute(
            "SELECT item, spec FROM source WHERE name = ?", (source.name,)
        ).fetchone()
        if there != item:
            raise _another_file(source, Source.from_json(spec), self.dataset_dir)
        if spec != text:
            # It may have been moved since.
            self.database.execute("UPDATE source SET spec = ? WHERE name = ?", (text, source.name))
        return False

    def _check_settings(self, settings: PrepSettings) -> None:
        row = self.database.execute("SELECT value FROM setting WHERE name = 'settings'").fetchone()
        if row is None:
            with self.database:
                self.database.execute(
                    "INSERT INTO setting VALUES ('settings', ?)", (settings.digest_text(),)
                )
            return
        differences = settings.differences(json.loads(row[0]))
        if differences and not self.count("SELECT EXISTS (SELECT 1 FROM source)"):
            # An earlier start found no source: nothing is made with its settings.
            with self.database:
                self.database.execute(
                    "UPDATE setting SET value = ? WHERE name = 'settings'",
                    (settings.digest_text(),),
                )
        elif differences:
            raise UsageError(
                f"{self.dataset_dir} was prepared with other settings: {'; '.join(differences)}",
                remedy="Give --out a new folder, run with the old settings, or replace it by "
                "--overwrite.",
            )


def other_reason(detail: str) -> str:
    """The reason of something that was found and is no source."""
    return BadReason.NO_VIDEO_NAME if "suffix" in detail else "not a source"


def _another_file(source: Source, there: Source, dataset_dir: Path) -> UsageError:
    return UsageError(
        f"{source.name[:300]!r} in {dataset_dir} is made of another file: of {there.num_bytes} "
        f"bytes at {there.locator[:300]!r}, now {source.num_bytes} bytes at "
        f"{source.locator[:300]!r} (sizes, times and labels are compared)",
        remedy="Put the old file back, rename the new one, or replace the dataset by --overwrite.",
    )
