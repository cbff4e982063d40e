"""What makes a folder of shards a dataset: the list of refusals, the index, the manifest."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.card import terms_of, write_card
from data_prep.figures import figures_of
from data_prep.ledger import Ledger
from data_prep.pack import packed
from data_prep.records import Rejection
from data_prep.settings import PrepSettings
from pipeline.data.indexing import IndexedShard, write_index
from pipeline.data.layout import INDEX_NAME, REJECTED_NAME, WEIGHTS_NAME, Manifest
from pipeline.data.manifest import read_manifest
from pipeline.errors import DataError, JepaError, StorageError
from pipeline.files import publish, sync_file


def published(ledger: Ledger) -> Manifest | None:
    """The manifest, if the folder is a finished dataset of all that the ledger has."""
    names = (INDEX_NAME, REJECTED_NAME)
    if not all((ledger.dataset_dir / name).is_file() for name in names):
        return None
    row = ledger.database.execute("SELECT value FROM setting WHERE name = 'published'").fetchone()
    return _manifest(ledger) if row == (_state(ledger),) else None


def publish_dataset(
    ledger: Ledger, settings: PrepSettings, say: Callable[[str], None] = lambda _line: None
) -> Manifest:
    """Writes what is not a shard; the manifest last, because it declares the dataset finished.

    Args:
        ledger: What became of the sources.
        settings: How they were prepared.
        say: Told what a person should know.

    Raises:
        DataError: No source could be used.
        StorageError: The folder cannot be written.
    """
    rejected, before = ledger.dataset_dir / REJECTED_NAME, _manifest(ledger)
    _write_lines(rejected, ledger.rejections())
    if not _numbers(ledger):
        num_sources = ledger.count("SELECT count(*) FROM source")
        raise DataError(
            f"none of {num_sources} sources could be used: {ledger.rejected_by_reason()}",
            remedy=f"{rejected} has a line per source with the reason.",
        )
    manifest = write_index(
        ledger.dataset_dir,
        _PackedShards(ledger),
        settings.as_json(),
        figures=figures_of(ledger.records()),
        before=before,
    )
    write_card(ledger.dataset_dir, manifest, ledger.rejected_by_reason())
    with ledger.database as database:
        row = ("published", _state(ledger))
        database.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", row)
    if before is not None and before.weights_sha256 != manifest.weights_sha256:
        say(
            f"{ledger.dataset_dir}/{WEIGHTS_NAME} was for the {before.num_samples} samples of "
            "before and is not used any more: weigh the samples again"
        )
    return manifest


def _manifest(ledger: Ledger) -> Manifest | None:
    """The manifest as it is; None if there is none, or it is damaged: it is written anew then."""
    try:
        return read_manifest(ledger.dataset_dir)
    except JepaError:
        return None


def _state(ledger: Ledger) -> str:
    """Counts of all that a dataset is made of; what is published with others is out of date.

    Its terms are part of it, where some are given: the card repeats them.
    """
    queries = (
        "SELECT count(*) FROM source WHERE done = 1",
        "SELECT count(*) FROM rejection",
        "SELECT count(*) FROM other",
        "SELECT count(*) FROM segment",
        "SELECT count(*) FROM segment WHERE original IS NOT NULL",
        "SELECT count(*) FROM shard WHERE done = 1",
    )
    terms = terms_of(ledger.dataset_dir)
    return json.dumps([*(ledger.count(query) for query in queries), *([terms] if terms else [])])


def _numbers(ledger: Ledger) -> list[int]:
    rows = ledger.database.execute("SELECT number FROM shard WHERE done = 1 ORDER BY number")
    return [number for (number,) in rows]


class _PackedShards:
    """All published shards, opened one after the other: each that is open costs a descriptor."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __iter__(self) -> Iterator[IndexedShard]:
        return (_packed_shard(self._ledger, number) for number in _numbers(self._ledger))


def _packed_shard(ledger: Ledger, number: int) -> IndexedShard:
    found = packed(ledger.shard_path(number), ledger.shard_rows(number))
    if found is None:
        raise StorageError(
            f"{ledger.shard_path(number)} changed while it was indexed",
            remedy="Run the same command again.",
        )
    return found


def _write_lines(path: Path, rejections: Iterator[Rejection]) -> None:
    """One object a line, without ever holding all of them."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for rejection in rejections:
                line = rejection.model_dump(exclude_none=True)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        sync_file(partial)
        publish(partial, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
