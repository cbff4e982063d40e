"""What a checkpoint looks like on disk, and which ones a run has.

RUN/checkpoints/step-00000400/              a commit: whole, or it would not have this name
    manifest.json                           every file with size and SHA-256, every tensor with its
                                            fingerprint; written last
    state.json                              step, data identity, parameter groups, counters
    weights-rank00000.safetensors           fp32 pieces of weights and averages: `encoder.…`,
                                            `predictor.…`, `teacher.…`
    optimizer-rank00000.safetensors         fp32 pieces of Adam's state: `exp_avg/encoder.…`,
                                            `exp_avg_sq/encoder.…`, `step/encoder.…`
    rng-rank00000.safetensors               this rank's random generators
    pinned                                  empty; there if the commit is kept for good
RUN/checkpoints/step-00000500.partial-…/    a save that was cut short; ignored, then removed
RUN/checkpoints/latest                      name of the newest commit; a hint only

A piece is a run of elements of one flattened tensor, without padding. The metadata of its file say
where it starts and what shape the whole has (`pieces.metadata_of`); its end follows from its
length. The pieces of all files together cover every tensor exactly once, whatever world size and
ZeRO stage wrote them, so a reader asks for neither. A rank that owns nothing writes no such file.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section
from pipeline.errors import CheckpointError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
PINNED = "pinned"
_COMMIT = re.compile(r"step-(\d{8,})")
_PARTIAL = re.compile(r"step-(\d{8,})\.partial-.+")


class CheckpointConfig(Section):
    """When checkpoints are written, where to, and which are kept."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] | None = 1000
    """Steps between checkpoints; `auto` weighs what a save costs against what a failure loses, null
    leaves it to `every_minutes`. One is also written at the start, at each stage's end, when the
    run is stopped and when it is done."""
    every_minutes: float | None = Field(default=None, gt=0.0)
    """Minutes between checkpoints, instead of or besides `every_steps`."""
    hours_between_failures: float = Field(default=24.0, gt=0.0)
    """How often the job is expected to fail, for `every_steps: auto`: 3 hours were seen on 16,000
    GPUs, and fewer of them fail more rarely in proportion."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this are written in any case and kept for good, for probes along
    the run; the first (the untrained weights), the last and pinned ones always are kept. Leave out
    to keep only those."""
    background: bool = True
    """Write behind the training, from a copy in host memory (16 bytes a parameter, divided among
    the ranks); false saves that memory and stands still until the checkpoint is published."""
    retries: int = Field(default=2, ge=0)
    """Further attempts at a save that the file system refused, after 1, 2, 4, … seconds."""
    max_failed_in_a_row: int = Field(default=3, ge=1)
    """So many failed saves in a row end the run with exit code 74; the last one of a run does at
    once."""
    timeout_minutes: float = Field(default=30.0, gt=0.0)
    """How long a save may wait for the slowest rank's files before it counts as failed."""
    store: str | None = None
    """URL below which every checkpoint is also published, such as s3://bucket/prefix: a run whose
    folder is lost is resumed from there."""

    @field_validator("store")
    @classmethod
    def _store_is_a_url(cls, store: str | None) -> str | None:
        if store is not None and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^@]*", store):
            raise ValueError(
                f"expected a URL such as s3://bucket/prefix with no password in it, got {store!r}"
            )
        return store

    @model_validator(mode="after")
    def _something_is_due(self) -> Self:
        if self.every_steps is None and self.every_minutes is None:
            raise ValueError("every_steps and every_minutes are both null: set one of them")
        if self.every_steps == "auto" and self.every_minutes is not None:
            raise ValueError("every_steps: auto chooses the time itself: leave every_minutes out")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a commit."""

    path: str
    """Relative to the commit, with forward slashes."""
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What makes a folder a commit: nothing else in it is trusted unless it is listed here."""

    schema_version: int
    run_id: str
    step: int
    world_size: int
    parent_step: int | None
    created: str
    """UTC, ISO 8601; a label, never used to decide anything."""
    versions: dict[str, str]
    files: tuple[FileEntry, ...]
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of every tensor by name, as `fingerprint.to_text` writes them; equal after resharding."""
    fence: int = 0
    """Number of the lease under which the run was owned; never falls from commit to commit."""

    def to_json(self) -> str:
        """The text of manifest.json; its last entry is the digest of the others."""
        content = asdict(self)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({**content, "sha256": digest}, indent=1) + "\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A whole checkpoint of a run."""

    step: int
    path: Path


def checkpoints_dir(run_dir: Path) -> Path:
    """Folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def commit_name(step: int) -> str:
    """Folder name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a commit's folder by its name; None if it is no commit's name."""
    match = _COMMIT.fullmatch(name)
    return int(match.group(1)) if match else None


def weights_name(rank: int) -> str:
    """File of a rank's fp32 pieces."""
    return f"weights-rank{rank:05d}.safetensors"


def optimizer_name(rank: int) -> str:
    """File of a rank's pieces of Adam's state."""
    return f"optimizer-rank{rank:05d}.safetensors"


def rng_name(rank: int) -> str:
    """File of a rank's random generators."""
    return f"rng-rank{rank:05d}.safetensors"


def list_commits(run_dir: Path) -> list[Commit]:
    """All commits of a run by rising step; whether their bytes are right is `verify`'s question."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        step = step_of(path.name)
        if step is not None and (path / MANIFEST).is_file():
            found.append(Commit(step=step, path=path))
    return sorted(found, key=lambda commit: commit.step)


def list_headless(run_dir: Path) -> list[Commit]:
    """Folders with a commit's name that lost their manifest; a save never leaves one like this."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    named = [(step_of(path.name), path) for path in folder.iterdir() if path.is_dir()]
    headless = [(step, path) for step, path in named if not (path / MANIFEST).is_file()]
    found = [Commit(step=step, path=path) for step, path in headless if step is not None]
    return sorted(found, key=lambda commit: commit.step)


def list_partials(run_dir: Path) -> list[Path]:
    """Saves that were cut short."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _PARTIAL.fullmatch(path.name))


def read_manifest(commit_dir: Path) -> Manifest:
    """Reads a commit's manifest.

    Raises:
        CheckpointError: It is missing, not readable or of another schema.
    """
    path = commit_dir / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{commit_dir} has no {MANIFEST}: it is not a checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """The manifest in a file's content.

    Args:
        content: Of the file, from wherever it was read.
        where: What messages call it.

    Raises:
        CheckpointError: It is no manifest, or one of another schema.
    """
    try:
        raw: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"Cannot read {where}: {error}") from error
    if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
        found = raw.get("schema_version") if isinstance(raw, dict) else None
        raise CheckpointError(
            f"{where} has schema version {found!r}; this jepa reads {SCHEMA_VERSION}.",
            remedy="Use the jepa version that wrote the checkpoint.",
        )
    try:
        files = tuple(FileEntry(**entry) for entry in raw.pop("files"))
        manifest = Manifest(files=files, **{k: v for k, v in raw.items() if k != "sha256"})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    # Byte for byte, digest included: blanks and the order of entries are nobody's to change.
    if manifest.to_json().encode() != content:
        raise CheckpointError(f"{where} is damaged: its own digest differs.")
    return manifest
