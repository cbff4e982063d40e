"""The database file of a ledger: who holds it, what it looks like, what its errors mean."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.layout import INDEX_NAME, MANIFEST_NAME, REJECTED_NAME
from pipeline.errors import StorageError, UsageError

_NAME = "ledger.sqlite"
_VERSION = 3
_SCHEMA = """
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE source (
  name TEXT NOT NULL UNIQUE, item TEXT NOT NULL, spec TEXT NOT NULL, bytes INTEGER NOT NULL,
  done INTEGER NOT NULL DEFAULT 0, record TEXT
);
CREATE INDEX pending ON source (name) WHERE done = 0;
CREATE TABLE other (name TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rejection (
  source TEXT NOT NULL, number INTEGER NOT NULL, reason TEXT NOT NULL, line TEXT NOT NULL,
  PRIMARY KEY (source, number)
) WITHOUT ROWID;
CREATE TABLE segment (
  source TEXT NOT NULL, number INTEGER NOT NULL, key TEXT NOT NULL, bytes INTEGER NOT NULL,
  seconds REAL NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, sha256 TEXT NOT NULL,
  hashes TEXT NOT NULL, original TEXT, likeness TEXT, shard INTEGER, PRIMARY KEY (source, number)
) WITHOUT ROWID;
CREATE INDEX by_shard ON segment (shard);
CREATE TABLE shard (number INTEGER PRIMARY KEY, done INTEGER NOT NULL DEFAULT 0);
"""
# Bounds what the driver takes, however many sources there are.
_CACHE_KIB = 64 * 1024
_START_OVER = "Give --out a new folder, or start over with --overwrite."


@contextmanager
def claimed_database(
    dataset_dir: Path, folder: Path, *, overwrite: bool
) -> Iterator[sqlite3.Connection]:
    """The database of a dataset for this process alone; made if there is none.

    Args:
        dataset_dir: The dataset.
        folder: Its hidden folder, which the database lies in.
        overwrite: Start over: remove what an earlier preparation wrote, and nothing else.

    Raises:
        UsageError: The folder holds something else, another version, or another process is at
            work in it.
        StorageError: It cannot be written.
    """
    path = folder / _NAME
    if not overwrite:
        _check_folder(dataset_dir, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{dataset_dir}: expected a folder, or none yet, got a file there or above it",
            remedy="Give --out another folder.",
        ) from error
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}") from error
    if overwrite:
        _empty(path, dataset_dir)
    with _explained(path, dataset_dir), _connected(path) as database:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise UsageError(
                f"{path}: of version {version}, this jepa writes {_VERSION}", remedy=_START_OVER
            )
        if version == 0:
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        yield database
        database.commit()


@contextmanager
def known_names(folder: Path) -> Iterator[Callable[[str], bool]]:
    """Tells which names a ledger has as done, without changing anything; none if there is none.

    Raises:
        UsageError: A preparation is at work there, or it is of another version.
        StorageError: It cannot be read.
    """
    path = folder / _NAME
    if not path.exists():
        yield lambda _name: False
        return
    query = "SELECT 1 FROM source WHERE name = ? AND done = 1"
    with _explained(path, folder.parent), _connected(path) as database:
        yield lambda name: database.execute(query, (name,)).fetchone() is not None


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(path, timeout=0.5)
    try:
        # Held until the end, so that a second driver is told instead of let in.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        database.execute("PRAGMA temp_store = FILE")
        database.execute("BEGIN EXCLUSIVE")
        database.commit()
        yield database
    finally:
        database.close()


@contextmanager
def _explained(path: Path, dataset_dir: Path) -> Iterator[None]:
    """What the database's errors mean to whoever runs a preparation."""
    try:
        yield
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise UsageError(
                f"another `jepa prep run` is at work in {dataset_dir}",
                remedy="Wait for it, or give --out another folder.",
            ) from error
        if "not a database" in str(error):
            raise UsageError(
                f"{path}: not a ledger of this version of jepa", remedy=_START_OVER
            ) from error
        raise StorageError(
            f"{path}: {error}",
            remedy="Free space or mend permissions, then run the same command to continue.",
        ) from error


def _check_folder(dataset_dir: Path, path: Path) -> None:
    try:
        # Killed before the database was there, a preparation leaves nothing but its folder.
        foreign = (
            dataset_dir.is_dir()
            and not path.exists()
            and any(found.name != path.parent.name for found in dataset_dir.iterdir())
        )
    except OSError as error:
        raise StorageError(f"{dataset_dir}: cannot be read: {error.strerror}") from error
    if foreign:
        raise UsageError(
            f"{dataset_dir} is not empty and was not prepared by this `jepa prep run`",
            remedy="Give --out a new or empty folder; --overwrite replaces an older dataset.",
        )


def _empty(path: Path, dataset_dir: Path) -> None:
    """Removes what a preparation writes, and nothing else, if nobody is at work there."""
    try:
        with _connected(path):
            _remove(path, dataset_dir)
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            with _explained(path, dataset_dir):
                raise
        _remove(path, dataset_dir)


def _remove(path: Path, dataset_dir: Path) -> None:
    for name in (MANIFEST_NAME, INDEX_NAME, REJECTED_NAME):
        (dataset_dir / name).unlink(missing_ok=True)
    for shard in dataset_dir.glob("shard-[0-9]*.tar"):
        shard.unlink()
    shutil.rmtree(path.parent)
    path.parent.mkdir()
