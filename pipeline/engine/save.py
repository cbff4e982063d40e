"""What this rank puts into a checkpoint, and how it is taken up again."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoint import layout
from pipeline.engine.zero import ZeroEngine

# Python's and NumPy's generators are both a Mersenne twister of 624 words.
_TWISTER_WORDS = 624


def write_rank_files(engine: ZeroEngine, folder: Path, state: dict[str, Any]) -> None:
    """Writes all files of this rank into an empty folder; every rank calls it.

    Args:
        engine: The engine to save, at an accumulation boundary.
        folder: This rank's own empty folder.
        state: The run's state, the same on all ranks; rank 0 writes it.
    """
    rank = dist.get_rank()
    # What ranks do together comes first: a rank that fails to write must not fail alone in there.
    pieces, shapes = engine.weights()
    engine.save(folder)
    if engine.is_partitioned or rank == 0:
        metadata = {
            "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
            "partitioned": json.dumps(engine.is_partitioned),
            "world_size": str(dist.get_world_size()),
        }
        flat = {name: piece.detach().cpu().contiguous() for name, piece in pieces.items()}
        _write(flat, folder / layout.weights_name(rank), metadata)
    _write(_generators(), folder / layout.rng_name(rank), {})
    if rank == 0:
        (folder / layout.STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")


def read_rank_files(engine: ZeroEngine, commit_dir: Path) -> None:
    """Restores weights, optimiser, averages and generators of this rank from a verified commit.

    Raises:
        CheckpointError: DeepSpeed found nothing to load.
    """
    rank = dist.get_rank()
    weights = load_file(commit_dir / layout.weights_name(rank if engine.is_partitioned else 0))
    engine.load(commit_dir, weights)
    _restore_generators(load_file(commit_dir / layout.rng_name(rank)))


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


def _restore_generators(saved: dict[str, Tensor]) -> None:
    torch.set_rng_state(saved["torch"])
    random.setstate((3, tuple(saved["python"].tolist()), None))
    words = saved["numpy"].tolist()
    state = np.array(words[:_TWISTER_WORDS], dtype=np.uint32)
    np.random.set_state(("MT19937", state, words[-1], 0, 0.0))  # noqa: NPY002
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
