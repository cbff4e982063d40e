"""What is already done: the plan of a dataset and one record per finished shard.

Lies in the hidden folder `.prep` of the dataset. A shard counts as done when its record is there,
which is written after the shard has its final name; anything else is done again from scratch.
"""

import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import JsonValue, ValidationError

from data_prep.settings import PrepSettings
from data_prep.sources import Source, inputs_digest
from pipeline.config.section import Section
from pipeline.data.format import INDEX_DTYPE
from pipeline.data.indexing import IndexedShard
from pipeline.data.layout import INDEX_NAME, MANIFEST_NAME, REJECTED_NAME, ShardEntry
from pipeline.data.manifest import write_durably
from pipeline.errors import StorageError, UsageError

_FOLDER = ".prep"
_PLAN_NAME = "plan.json"


class Rejection(Section):
    """One source that gave no sample, or not all it promised; a line of rejected.jsonl."""

    source: str
    """Name of the video."""
    reason: str
    """Short reason, one of `BadReason`."""
    detail: str
    """What exactly was found."""
    kept_samples: int = 0
    """Samples made of the part that does decode."""


class PartRecord(Section):
    """What one part of the sources became."""

    inputs: str
    """Digest of its sources and of the settings."""
    shard: ShardEntry | None
    """The shard; none if no source of this part was accepted."""
    num_sources: int
    """Videos of this part."""
    rejections: tuple[Rejection, ...]
    """Videos that were refused or are partial."""


class Plan(Section):
    """What a dataset folder is meant to hold."""

    settings: dict[str, JsonValue]
    """How the videos are prepared."""
    num_sources: int
    """Videos to prepare."""
    source_bytes: int
    """Their size."""
    inputs: str
    """Digest of all sources and of the settings."""


class Ledger:
    """The hidden folder of one dataset."""

    def __init__(self, dataset_dir: Path) -> None:
        self.dataset_dir = dataset_dir
        self.folder = dataset_dir / _FOLDER

    def begin(self, sources: Sequence[Source], settings: PrepSettings, *, overwrite: bool) -> None:
        """Claims the dataset's folder for these sources and settings, or continues with them.

        Raises:
            UsageError: The folder holds something else and `overwrite` is not set.
            StorageError: The folder cannot be written.
        """
        plan = Plan(
            settings=settings.as_json(),
            num_sources=len(sources),
            source_bytes=sum(source.num_bytes for source in sources),
            inputs=inputs_digest(sources, settings),
        )
        path = self.folder / _PLAN_NAME
        if overwrite:
            self._clear()
        elif path.exists():
            _check_same(_read_plan(path), plan, settings, self.dataset_dir)
        elif self.dataset_dir.is_dir() and any(self.dataset_dir.iterdir()):
            raise UsageError(
                f"{self.dataset_dir} is not empty and was not prepared by `jepa prep run`",
                remedy="Give --out a new or empty folder.",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be made: {error.strerror}") from error
        for leftover in self.folder.glob("*.partial*"):
            leftover.unlink(missing_ok=True)
        write_durably(path, plan.model_dump_json(indent=1).encode() + b"\n")

    def shard_path(self, part: int) -> Path:
        """Where the shard of part number `part` goes."""
        return self.dataset_dir / f"shard-{part:06d}.tar"

    def partial_path(self, part: int) -> Path:
        """Where this process writes that shard until it is whole."""
        return self.folder / f"part-{part:06d}.{os.getpid()}.partial"

    def marker_path(self, part: int) -> Path:
        """Holds the source that the worker of a part is at, for the case that it dies."""
        return self.folder / f"part-{part:06d}.current"

    def write(self, part: int, record: PartRecord, rows: np.ndarray) -> None:
        """Records that a part is done; its shard has its final name already."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, rows, version=(1, 0), allow_pickle=False)
        write_durably(self.folder / f"part-{part:06d}.npy", buffer.getvalue())
        text = record.model_dump_json(indent=1)
        write_durably(self.folder / f"part-{part:06d}.json", text.encode() + b"\n")
        self.marker_path(part).unlink(missing_ok=True)

    def read(self, part: int, inputs: str) -> PartRecord | None:
        """The record of a part, if it was done from just these inputs and its shard is there."""
        try:
            text = (self.folder / f"part-{part:06d}.json").read_bytes()
            record = PartRecord.model_validate_json(text)
            if record.shard is not None:
                size = self.shard_path(part).stat().st_size
                if size != record.shard.bytes:
                    return None
        except (OSError, ValidationError):
            return None
        return record if record.inputs == inputs else None

    def indexed(self, part: int, entry: ShardEntry) -> IndexedShard:
        """What the index needs of a finished part.

        Raises:
            StorageError: Its rows are gone or damaged.
        """
        path = self.folder / f"part-{part:06d}.npy"
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StorageError(f"{path}: {error}", remedy=f"Remove {self.folder}.") from error
        if rows.dtype != INDEX_DTYPE or len(rows) != entry.num_samples:
            raise StorageError(f"{path}: of another version", remedy=f"Remove {self.folder}.")
        return IndexedShard(entry=entry, records=rows)

    def _clear(self) -> None:
        """Removes what a preparation writes, and nothing else."""
        for name in (MANIFEST_NAME, INDEX_NAME, REJECTED_NAME):
            (self.dataset_dir / name).unlink(missing_ok=True)
        for shard in self.dataset_dir.glob("shard-[0-9]*.tar"):
            shard.unlink()
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(
            f"{path}: not a plan of this version of jepa",
            remedy="Give --out a new folder, or start over with --overwrite.",
        ) from error


def _check_same(there: Plan, wanted: Plan, settings: PrepSettings, dataset_dir: Path) -> None:
    if there.inputs == wanted.inputs:
        return
    differences = settings.differences(there.settings)
    if not differences:
        differences = [
            f"sources were {there.num_sources} videos of {there.source_bytes} bytes, now "
            f"{wanted.num_sources} of {wanted.source_bytes} (names, sizes and times are compared)"
        ]
    raise UsageError(
        f"{dataset_dir} holds another dataset: {'; '.join(differences)}",
        remedy="Give --out a new folder, run with the old settings, or replace it by --overwrite.",
    )
