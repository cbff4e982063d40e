"""Shared memory in which workers hand micro-batches over, used again and again.

A fresh shared block costs a page fault per 4 KiB, six per cent of a worker's time, so every worker
owns a few and fills one again once the training process has let go of what it held. Neither side
ever waits: if none is free, the worker takes fresh memory, and torch frees it after its use.
"""

import math
import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.clip import ClipBatch, MaskSet
from pipeline.errors import StorageError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's own name for it

# All tensors of a micro-batch but its video and its masks.
_SMALL = ("times_BT", "states_BTS", "actions_BTA")


def require_shared_memory(num_bytes: int, whose: str, folder: Path = SHARED_MEMORY) -> None:
    """Make sure before a run that its micro-batches will fit; without, a worker dies of SIGBUS.

    Args:
        num_bytes: What all loader workers on this machine take.
        whose: Who takes it, for the message.
        folder: Where the shared memory is mounted; where there is none, nothing is checked.

    Raises:
        StorageError: There is less.
    """
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise StorageError(
            f"shared memory {folder}: need {num_bytes / 2**20:.0f} MiB for {whose}, "
            f"have {free / 2**20:.0f} MiB",
            remedy="Use fewer data.workers, a smaller data.prefetch, or a larger /dev/shm "
            "(`docker run --shm-size`, a memory-backed emptyDir in Kubernetes).",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlace:
    """One block: the worker that owns it, and its number there."""

    worker: int
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A micro-batch on its way, and the block that its video lies in, if it is one of ours."""

    batch: ClipBatch
    place: BlockPlace | None
    copied: bool = False
    """True once the video has left its block for page-locked memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Small tensors travel inside the message: a file descriptor for each costs more."""
        small = {name: getattr(self.batch, name) for name in _SMALL}
        arrays = {name: tensor.numpy() for name, tensor in small.items() if tensor is not None}
        masks = [_as_arrays(mask) for mask in self.batch.masks]
        rest = replace(self.batch, masks=(), **dict.fromkeys(_SMALL))
        return _received, (rest, arrays, masks, self.place)

    def pin_memory(self) -> "Sent":
        """Called by torch's DataLoader in its pinning thread."""
        return replace(self, batch=self.batch.pin_memory(), copied=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Memory for one micro-batch's video, uint8 [B, T, H, W, C]."""

    video_BTHWC: Tensor
    place: BlockPlace | None


@dataclass(slots=True)
class Blocks:
    """A worker's blocks. Pickled to the workers while it still has none.

    Args:
        in_use_WN: Shared uint8 flags, one per worker and block: the worker sets one when it fills
            the block, the training process clears it. No flag is ever set by both.
    """

    in_use_WN: Tensor
    _storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def take(self, shape: tuple[int, ...]) -> Block:
        """Memory for a video of `shape`: a free block, or fresh memory if there is none."""
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return Block(video_BTHWC=torch.empty(shape, dtype=torch.uint8), place=None)
        num_bytes = math.prod(shape)
        for number, in_use in enumerate(self.in_use_WN[worker.id].tolist()):
            if not in_use:
                self.in_use_WN[worker.id, number] = 1
                place = BlockPlace(worker=worker.id, number=number)
                storage = self._storage(number, num_bytes)
                return Block(video_BTHWC=_as_tensor(storage, shape), place=place)
        return Block(video_BTHWC=_as_tensor(_shared(num_bytes), shape), place=None)

    def _storage(self, number: int, num_bytes: int) -> torch.UntypedStorage:
        storage = self._storages.get(number)
        if storage is None or storage.nbytes() < num_bytes:
            storage = self._storages[number] = _shared(num_bytes)
        return storage


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMemory:
    """What the training process and its workers share; pickled to each worker."""

    blocks: Blocks
    at_W2: Tensor
    """Global position and attempt that each worker is loading, int64; -1 while it loads none."""

    @classmethod
    def make(cls, num_workers: int, num_blocks: int) -> Self:
        """Memory for some workers with some blocks each, all free."""
        in_use_WN = torch.zeros((num_workers, num_blocks), dtype=torch.uint8).share_memory_()
        at_W2 = torch.full((num_workers, 2), -1, dtype=torch.int64).share_memory_()
        return cls(blocks=Blocks(in_use_WN), at_W2=at_W2)

    def note(self, position: int, attempt: int) -> None:
        """Leave word of what this worker is at, for the case that it dies of it; -1 for nothing."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            self.at_W2[worker.id, 0], self.at_W2[worker.id, 1] = position, attempt


class Returns:
    """The training process's side: gives blocks back once nothing refers to them any more."""

    def __init__(self, in_use_WN: Tensor) -> None:
        self._in_use_WN = in_use_WN
        self._lent: list[tuple[StorageWeakRef, BlockPlace]] = []

    def receive(self, sent: Sent) -> ClipBatch:
        """The micro-batch; from now on its block is watched."""
        if sent.place is not None and sent.copied:
            self._free(sent.place)
        elif sent.place is not None:
            storage = sent.batch.video_BCTHW.untyped_storage()
            self._lent.append((StorageWeakRef(storage), sent.place))
        return sent.batch

    def collect(self) -> None:
        """Free the blocks whose video is gone, views and copies that share its memory included."""
        kept = []
        for reference, place in self._lent:
            if reference.expired():
                self._free(place)
            else:
                kept.append((reference, place))
        self._lent = kept

    def _free(self, place: BlockPlace) -> None:
        self._in_use_WN[place.worker, place.number] = 0


def _received(
    rest: ClipBatch,
    arrays: dict[str, np.ndarray],
    masks: list[dict[str, Any]],
    place: BlockPlace | None,
) -> Sent:
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["masks"] = tuple(MaskSet(**_as_tensors(mask)) for mask in masks)
    return Sent(batch=replace(rest, **tensors), place=place)


def _as_arrays(mask: MaskSet) -> dict[str, Any]:
    values = {field.name: getattr(mask, field.name) for field in fields(mask)}
    return {n: v.numpy() if isinstance(v, Tensor) else v for n, v in values.items()}


def _as_tensors(values: dict[str, Any]) -> dict[str, Any]:
    return {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in values.items()}


def _shared(num_bytes: int) -> torch.UntypedStorage:
    # As torch's default_collate; `share_memory_` would touch every page twice.
    return torch.UntypedStorage._new_shared(num_bytes)


def _as_tensor(storage: torch.UntypedStorage, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(0, dtype=torch.uint8)
    return tensor.set_(storage, 0, shape)  # pyright: ignore[reportCallIssue]
