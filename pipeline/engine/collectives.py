"""The last collectives of a rank, as torch's flight recorder holds them: what a hang leaves behind.

`torchfrtrace --prefix collectives-rank- RUN/faults` lays those of all ranks side by side and names
the first that not all have entered.
"""

import contextlib
import threading
from pathlib import Path
from typing import Any

import torch

COLLECTIVES = "collectives-rank-"
# The process is about to be ended: whatever hangs in there must not keep it.
_PATIENCE_SECONDS = 5.0


def write_collectives(folder: Path, rank: int) -> None:
    """Leaves them in a file of this rank; asks no other rank, and returns within seconds."""
    writing = threading.Thread(target=_write, args=(folder, rank), daemon=True)
    writing.start()
    writing.join(_PATIENCE_SECONDS)


def _write(folder: Path, rank: int) -> None:
    recorder: Any = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]
    # Private, and the only way to them. On GPUs NCCL has a recorder of its own.
    dump = getattr(recorder, "_dump_nccl_trace" if torch.cuda.is_initialized() else "", None)
    dump = dump or getattr(recorder, "_dump_fr_trace", None)
    if dump is None:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder.mkdir(exist_ok=True)
        (folder / f"{COLLECTIVES}{rank}").write_bytes(dump())
