"""What this rank puts into a checkpoint, and how it is taken up again."""

import json
import random
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
from pipeline.engine.zero import ZeroEngine

# Python's and NumPy's generators are both a Mersenne twister of 624 words.
_TWISTER_WORDS = 624


def write_rank_files(engine: ZeroEngine, folder: Path, state: dict[str, Any]) -> dict[str, int]:
    """Writes all files of this rank into an empty folder; every rank calls it.

    Args:
        engine: The engine to save, at an accumulation boundary.
        folder: This rank's own empty folder.
        state: The run's state, the same on all ranks; rank 0 writes it.

    Returns:
        This rank's part of every tensor's fingerprint, by name.
    """
    rank = dist.get_rank()
    pieces = engine.pieces()
    _write_pieces(
        [p for p in pieces if not p.is_optimizer_state], folder / layout.weights_name(rank)
    )
    _write_pieces([p for p in pieces if p.is_optimizer_state], folder / layout.optimizer_name(rank))
    _write(_generators(), folder / layout.rng_name(rank), {})
    if rank == 0:
        (folder / layout.STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
    return fingerprint_pieces(pieces)


def _write_pieces(pieces: list[Piece], path: Path) -> None:
    if pieces:
        # Copies: safetensors refuses views of one storage, which is what ZeRO has.
        flat = {p.name: p.flat.detach().to("cpu", copy=True) for p in pieces}
        _write(flat, path, metadata_of(pieces))


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
    """Sets this process's random generators to what `write_rank_files` saved of them."""
    torch.set_rng_state(saved["torch"])
    random.setstate((3, tuple(saved["python"].tolist()), None))
    words = saved["numpy"].tolist()
    state = np.array(words[:_TWISTER_WORDS], dtype=np.uint32)
    np.random.set_state(("MT19937", state, words[-1], 0, 0.0))  # noqa: NPY002
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
