"""What this rank puts into a checkpoint, and how it is taken up again."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoint import layout
from pipeline.checkpoint.fingerprint import fingerprint_pieces
from pipeline.checkpoint.pieces import Piece, metadata_of
from pipeline.checkpoint.staging import HostCopies
from pipeline.engine.zero import ZeroEngine

# Python's and NumPy's generators are both a Mersenne twister of 624 words.
_TWISTER_WORDS = 624


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFiles:
    """What one rank puts into a checkpoint."""

    rank: int
    pieces: list[Piece]
    generators: dict[str, Tensor]
    state: dict[str, Any]
    """The run's state, the same on all ranks; rank 0 writes it."""
    ready: torch.cuda.Event | None = None
    """On a GPU, when the pieces are what they shall be."""

    def copied(self, copies: HostCopies) -> "RankFiles":
        """The same in host memory; until this returns, no weight may be changed."""
        if self.ready is None:
            return replace(self, pieces=copies.take(self.pieces))
        # A stream of its own: the copy goes on beside what the next step computes.
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(self.ready)
            return replace(self, pieces=copies.take(self.pieces), ready=None)

    @property
    def num_bytes(self) -> int:
        """Bytes that `write` writes, but for headers."""
        tensors = [*(piece.flat for piece in self.pieces), *self.generators.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def write(self, folder: Path) -> dict[str, int]:
        """Writes all files of this rank into an empty folder; needs no other rank.

        Returns:
            This rank's part of every tensor's fingerprint, by name.
        """
        weights = [piece for piece in self.pieces if not piece.is_optimizer_state]
        optimizer = [piece for piece in self.pieces if piece.is_optimizer_state]
        _write_pieces(weights, folder / layout.weights_name(self.rank))
        _write_pieces(optimizer, folder / layout.optimizer_name(self.rank))
        _write(self.generators, folder / layout.rng_name(self.rank), {})
        if self.rank == 0:
            text = json.dumps(self.state, indent=1, sort_keys=True) + "\n"
            (folder / layout.STATE).write_text(text)
        return fingerprint_pieces(self.pieces)


def rank_files(engine: ZeroEngine, state: dict[str, Any]) -> RankFiles:
    """What a checkpoint needs of this rank, the pieces live; needs no other rank.

    Args:
        engine: The engine to save, at an accumulation boundary.
        state: The run's state, the same on all ranks.
    """
    pieces, ready = engine.pieces(), None
    if torch.cuda.is_available():
        ready = torch.cuda.Event()
        ready.record()
    return RankFiles(
        rank=dist.get_rank(), pieces=pieces, generators=_generators(), state=state, ready=ready
    )


def copy_rank_files(engine: ZeroEngine, copies: HostCopies, state: dict[str, Any]) -> RankFiles:
    """What a checkpoint needs of this rank, copied into host memory."""
    return rank_files(engine, state).copied(copies)


def _write_pieces(pieces: list[Piece], path: Path) -> None:
    if pieces:
        _write({piece.name: piece.flat for piece in pieces}, path, metadata_of(pieces))


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error


def _generators() -> dict[str, Tensor]:
    _, python_words, _ = random.getstate()
    _, numpy_words, numpy_place, *_ = np.random.get_state()  # noqa: NPY002 - libraries use it
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_words, dtype=torch.int64),
        "numpy": torch.tensor([*numpy_words, numpy_place], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore_generators(saved: dict[str, Tensor]) -> None:
    """Sets this process's random generators to what `copy_rank_files` took of them."""
    torch.set_rng_state(saved["torch"])
    random.setstate((3, tuple(saved["python"].tolist()), None))
    words = saved["numpy"].tolist()
    state = np.array(words[:_TWISTER_WORDS], dtype=np.uint32)
    np.random.set_state(("MT19937", state, words[-1], 0, 0.0))  # noqa: NPY002
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
