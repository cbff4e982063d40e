"""A rank's state in host memory, apart from what training goes on to change."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.checkpoint.pieces import Piece


class HostCopies:
    """Copies pieces into buffers that are made once and used again by every save.

    They cost as much host memory as the rank's pieces have bytes. Buffers of what lies on a GPU
    are pinned: only then does the copy run at the speed of the bus and beside other work.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The same pieces with elements of their own; what was taken before is overwritten."""
        copies = []
        devices: set[torch.device] = set()
        for piece in pieces:
            flat = piece.flat.detach()
            buffer = self._buffer(piece.name, flat)
            buffer.copy_(flat, non_blocking=True)
            copies.append(replace(piece, flat=buffer))
            if flat.is_cuda:
                devices.add(flat.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = buffer
        return buffer
