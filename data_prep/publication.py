"""What makes a folder of shards a dataset: the list of refusals, the index, the manifest."""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.card import write_card
from data_prep.figures import figures_of
from data_prep.ledger import Ledger
from data_prep.pack import packed
from data_prep.records import Rejection
from data_prep.settings import PrepSettings
from pipeline.data.indexing import IndexedShard, write_index
from pipeline.data.layout import INDEX_NAME, REJECTED_NAME, Manifest
from pipeline.data.manifest import read_manifest
from pipeline.errors import DataError, JepaError, StorageError
from pipeline.files import publish, sync_file


def published(ledger: Ledger) -> Manifest | None:
    """The manifest, if the folder is a finished dataset already."""
    names = (INDEX_NAME, REJECTED_NAME)
    if not all((ledger.dataset_dir / name).is_file() for name in names):
        return None
    try:
        manifest = read_manifest(ledger.dataset_dir)
    except JepaError:
        # Whatever is wrong with it, it is written anew.
        return None
    return manifest if len(manifest.shards) == len(_numbers(ledger)) else None


def publish_dataset(ledger: Ledger, settings: PrepSettings) -> Manifest:
    """Writes what is not a shard; the manifest last, because it declares the dataset finished.

    Raises:
        DataError: No source could be used.
        StorageError: The folder cannot be written.
    """
    rejected = ledger.dataset_dir / REJECTED_NAME
    _write_lines(rejected, ledger.rejections())
    shards = [_packed_shard(ledger, number) for number in _numbers(ledger)]
    if not shards:
        num_sources = ledger.count("SELECT count(*) FROM source")
        raise DataError(
            f"none of {num_sources} sources could be used: {ledger.rejected_by_reason()}",
            remedy=f"{rejected} has a line per source with the reason.",
        )
    manifest = write_index(
        ledger.dataset_dir, shards, settings.as_json(), figures=figures_of(ledger.records())
    )
    write_card(ledger.dataset_dir, manifest, ledger.rejected_by_reason())
    return manifest


def _numbers(ledger: Ledger) -> list[int]:
    rows = ledger.database.execute("SELECT number FROM shard WHERE done = 1 ORDER BY number")
    return [number for (number,) in rows]


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
