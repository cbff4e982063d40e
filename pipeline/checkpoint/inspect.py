"""What is in a commit, for people who look: its tensors proved and summed up."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.checkpoint import layout
from pipeline.checkpoint.fingerprint import combine, fingerprint_piece, to_text
from pipeline.checkpoint.pieces import Piece
from pipeline.checkpoint.reshard import CommitTensors
from pipeline.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFacts:
    """A tensor in numbers; those of elements leave out what is not finite."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fingerprint: str
    num_pieces: int
    num_not_finite: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None


def tensor_problems(commit_dir: Path) -> list[str]:
    """What is wrong with the tensors of a commit whose files are whole; one line a problem.

    Digests tell that files are what was written; this tells that what was written is what the
    ranks held: every element there once, and every tensor's fingerprint that of the manifest.
    """
    expected = layout.read_manifest(commit_dir).fingerprints
    problems = []
    try:
        with CommitTensors(commit_dir) as tensors:
            names = tensors.names()
            for name in names:
                problems += _problems_of(tensors.pieces(name), expected.get(name))
    except CheckpointError as error:
        return [str(error)]
    problems += [f"tensor {name} is missing" for name in sorted(expected.keys() - set(names))]
    return problems


def tensor_facts(commit_dir: Path, name: str) -> TensorFacts:
    """A tensor of a commit in numbers.

    Raises:
        CheckpointError: The commit has no such tensor; the message names those that are like it.
    """
    with CommitTensors(commit_dir) as tensors:
        names = tensors.names()
        if name not in names:
            near = [other for other in names if name in other] or names
            few = ", ".join(near[:8]) + (", …" if len(near) > 8 else "")
            raise CheckpointError(
                f"{commit_dir} holds no tensor {name!r}; there are {few}",
                remedy="`jepa ckpt cat RUN` lists all of them.",
            )
        pieces = tensors.pieces(name)
        whole = tensors.whole(name).double()
    finite = whole[whole.isfinite()]
    has_some = bool(finite.numel())
    return TensorFacts(
        name=name,
        shape=pieces[0].shape,
        dtype=str(pieces[0].flat.dtype).removeprefix("torch."),
        fingerprint=_fingerprint(pieces),
        num_pieces=len(pieces),
        num_not_finite=whole.numel() - finite.numel(),
        minimum=finite.min().item() if has_some else None,
        maximum=finite.max().item() if has_some else None,
        mean=finite.mean().item() if has_some else None,
        std=finite.std(correction=0).item() if has_some else None,
    )


def tensor_shapes(commit_dir: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a commit by name, in the order of its files."""
    with CommitTensors(commit_dir) as tensors:
        return {name: tensors.shape_of(name) or () for name in tensors.names()}


def _problems_of(pieces: list[Piece], expected: str | None) -> list[str]:
    name, end = pieces[0].name, 0
    for piece in pieces:
        if piece.start != end:
            what = "there twice" if piece.start < end else "missing"
            return [f"tensor {name}: elements from {min(piece.start, end)} on are {what}"]
        end = piece.stop
    if end != torch.Size(pieces[0].shape).numel():
        return [f"tensor {name}: elements from {end} on are missing"]
    if expected is None:
        return [f"tensor {name} is not in the manifest"]
    found = _fingerprint(pieces)
    if found != expected:
        return [f"tensor {name}: fingerprint {found}, expected {expected}"]
    return []


def _fingerprint(pieces: list[Piece]) -> str:
    return to_text(combine(fingerprint_piece(piece.flat, piece.start) for piece in pieces))
