"""Reading and writing a dataset's manifest, and the digests that identify a dataset."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.layout import MANIFEST_NAME, SCHEMA_VERSION, SHARD_PATTERN, Manifest, ShardEntry
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.files import sha256_of, write_atomically

PREPARE_AGAIN = "Prepare it again with `jepa prep run`, or fetch a whole copy of it."
_MAX_MANIFEST_BYTES = 1 << 28


def read_manifest(dataset_dir: Path) -> Manifest:
    """The manifest of a finished dataset.

    Raises:
        UsageError: There is none, or it has another schema version.
        DataError: It is malformed.
        StorageError: It cannot be read.
    """
    path = dataset_dir / MANIFEST_NAME
    text = _content(dataset_dir)
    if len(text) > _MAX_MANIFEST_BYTES:
        raise DataError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes", remedy=PREPARE_AGAIN)
    try:
        version = json.loads(text).get("schema_version")
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{path}: schema version {version!r}, this jepa reads {SCHEMA_VERSION}",
                remedy="Use the jepa that wrote it, or prepare the videos again.",
            )
        manifest = Manifest.model_validate_json(text)
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: malformed: {error}", remedy=PREPARE_AGAIN) from error
    for shard in manifest.shards:
        if not SHARD_PATTERN.fullmatch(shard.name):
            raise DataError(f"{path}: {shard.name!r} is no shard's name", remedy=PREPARE_AGAIN)
    if manifest.digest != dataset_digest(manifest.index_sha256, manifest.shards):
        raise DataError(f"{path}: digest does not fit the shards", remedy=PREPARE_AGAIN)
    return manifest


def dataset_digest(index_sha256: str, shards: Sequence[ShardEntry]) -> str:
    """SHA-256 over the digests of the index and of every shard, in order."""
    text = "\n".join(
        [index_sha256, *(f"{shard.name} {shard.bytes} {shard.sha256}" for shard in shards)]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_text(manifest: Manifest) -> bytes:
    """The content of `manifest.json`; the same manifest gives the same bytes."""
    # What is left out has its default: manifests that do not need a newer field stay as they were.
    known = manifest.model_dump(mode="json")
    for name in ("weights_sha256", "captions"):
        if known[name] == Manifest.model_fields[name].default:
            del known[name]
    if not manifest.figures:
        del known["figures"]
    return json.dumps(known, indent=1, ensure_ascii=False).encode() + b"\n"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def write_durably(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step that survives a crash of the machine.

    Raises:
        StorageError: The file system refused.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _content(dataset_dir: Path) -> bytes:
    try:
        with (dataset_dir / MANIFEST_NAME).open("rb") as file:
            return file.read(_MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        where = "" if dataset_dir.is_absolute() else f", looked for in {Path.cwd()}"
        raise UsageError(
            f"{dataset_dir}{where}: no prepared dataset "
            f"(no readable {MANIFEST_NAME}: {error.strerror})",
            remedy="Prepare videos with `jepa prep run SOURCE --out FOLDER`, or correct the path.",
        ) from error
    except OSError as error:
        raise StorageError(
            f"{dataset_dir / MANIFEST_NAME}: cannot be read: {error.strerror}"
        ) from error
