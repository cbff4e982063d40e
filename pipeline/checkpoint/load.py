"""Finding, verifying and reading checkpoints. Nothing is parsed before its digest matches."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import Commit, Manifest
from pipeline.checkpoint.reshard import CommitTensors
from pipeline.errors import CheckpointError, StorageError
from pipeline.files import sha256_of

# Which prefix of the weights file is meant by the words that people use.
_PREFIX = {"teacher": "teacher.", "student": "encoder.", "predictor": "predictor."}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A commit that is not what its manifest says."""

    commit: Commit
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"step {self.commit.step}: {'; '.join(self.reasons)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The commit to use, and the newer ones that were turned down."""

    commit: Commit
    manifest: Manifest
    rejected: tuple[Rejected, ...]


def find_commit(run_dir: Path, step: int | None = None, *, run_id: str | None = None) -> Found:
    """The newest whole commit of a run, or that of a step, with every digest checked.

    Args:
        run_dir: Folder of the run.
        step: A step to insist on; the newest that verifies otherwise.
        run_id: The run that it has to be of, if that is known.

    Raises:
        CheckpointError: There is none, the one asked for is not there, or it is damaged.
    """
    commits = [*layout.list_commits(run_dir), *layout.list_headless(run_dir)]
    if not commits:
        raise CheckpointError(
            f"{run_dir} has no checkpoint.", remedy="Start the run with `jepa train CONFIG`."
        )
    if step is not None:
        commits = [commit_of_step(run_dir, step)]
    rejected = []
    for commit in sorted(commits, key=lambda commit: commit.step, reverse=True):
        problems = verify(commit.path, run_id=run_id)
        if not problems:
            manifest = layout.read_manifest(commit.path)
            return Found(commit=commit, manifest=manifest, rejected=tuple(rejected))
        rejected.append(Rejected(commit=commit, reasons=tuple(problems)))
    lines = [str(bad) for bad in rejected]
    raise CheckpointError(f"No checkpoint of {run_dir} is whole.\n  " + "\n  ".join(lines))


def commit_of_step(run_dir: Path, step: int) -> Commit:
    """The commit of a step, not verified.

    Raises:
        CheckpointError: There is none; the message lists those that exist.
    """
    commits = layout.list_commits(run_dir)
    for commit in [*commits, *layout.list_headless(run_dir)]:
        if commit.step == step:
            return commit
    there = ", ".join(str(commit.step) for commit in commits) or "none"
    raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; there are: {there}.")


def verify(commit_dir: Path, *, run_id: str | None = None, digests: bool = True) -> list[str]:
    """What is wrong with a commit: one line a problem, none if every byte is as it was written.

    Args:
        commit_dir: Folder of the commit; its name says of which step it has to be.
        run_id: The run that it has to be of, if that is known.
        digests: Read and compare all content; only names and sizes otherwise.

    Raises:
        StorageError: The file system refuses to read.
    """
    try:
        manifest = layout.read_manifest(commit_dir)
        return [
            *_misplaced(commit_dir, manifest, run_id),
            *_differences(commit_dir, manifest, digests=digests),
            *_extra(commit_dir, manifest),
        ]
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        # Not the same as damage: going back to an older commit would lose work for nothing.
        raise StorageError(f"Cannot read {error.filename}: {error.strerror or error}") from error


def _misplaced(commit_dir: Path, manifest: Manifest, run_id: str | None) -> list[str]:
    problems = []
    if layout.step_of(commit_dir.name) not in (None, manifest.step):
        problems.append(f"file {layout.MANIFEST} is of step {manifest.step}")
    if run_id is not None and manifest.run_id != run_id:
        problems.append(f"it is of run {manifest.run_id}, the folder of run {run_id}")
    return problems


def _differences(commit_dir: Path, manifest: Manifest, *, digests: bool) -> list[str]:
    problems = []
    for entry in manifest.files:
        path = commit_dir / entry.path
        if not path.is_file():
            problems.append(f"file {entry.path} is missing")
        elif path.stat().st_size != entry.num_bytes:
            size = path.stat().st_size
            problems.append(f"file {entry.path} has {size} bytes, expected {entry.num_bytes}")
        elif digests and sha256_of(path) != entry.sha256:
            problems.append(f"file {entry.path}: its digest differs, its content was changed")
    return problems


def read_state(commit_dir: Path) -> dict[str, Any]:
    """state.json of a verified commit."""
    return json.loads((commit_dir / layout.STATE).read_text())


def load_encoder_state(
    commit_dir: Path, which: Literal["teacher", "student", "predictor"] = "teacher"
) -> dict[str, Tensor]:
    """A network's fp32 weights from a training checkpoint, at any world size.

    Needs neither DeepSpeed nor a process group: pieces of all ranks are put together one
    parameter at a time.

    Args:
        commit_dir: A commit's folder.
        which: The averaged `teacher` (what evaluations use), the `student` or the `predictor`.

    Returns:
        Weights by parameter name as the module itself names them.

    Raises:
        CheckpointError: The commit is damaged or holds no such network.
    """
    problems = verify(commit_dir)
    if problems:
        raise CheckpointError(f"{commit_dir} is not whole: {'; '.join(problems)}")
    prefix = _PREFIX[which]
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in iterate_weights(commit_dir)
        if name.startswith(prefix)
    }
    if not state:
        raise CheckpointError(f"{commit_dir} holds no {which}.")
    return state


def iterate_weights(commit_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """All whole fp32 weights of a commit, one after the other, so that memory stays small."""
    with CommitTensors(commit_dir, with_optimizer=False) as tensors:
        for name in tensors.names():
            yield name, tensors.whole(name)


def _extra(commit_dir: Path, manifest: Manifest) -> list[str]:
    known = {entry.path for entry in manifest.files} | {layout.MANIFEST, layout.PINNED}
    there = (path for path in commit_dir.rglob("*") if path.is_file())
    names = sorted({path.relative_to(commit_dir).as_posix() for path in there} - known)
    return [f"file {name} is not in the manifest" for name in names]
