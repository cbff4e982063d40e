"""Pieces of tensors: what a rank writes into a checkpoint and what readers put together again."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# Prefixes of Adam's state in the optimiser's files; a weight's own name has none.
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of elements of one flattened tensor, held by one rank."""

    name: str
    """Such as `encoder.norm.bias`, `teacher.norm.bias` or `exp_avg/encoder.norm.bias`."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Index of the first element in the flattened tensor."""
    flat: Tensor
    """[n]: the elements, live (a view of what the engine works on) and without padding."""

    @property
    def stop(self) -> int:
        """Index after the last element."""
        return self.start + self.flat.numel()

    @property
    def is_optimizer_state(self) -> bool:
        """Whether it belongs into the optimiser's file rather than that of the weights."""
        return "/" in self.name


def metadata_of(pieces: Iterable[Piece]) -> dict[str, str]:
    """What a safetensors file of these pieces carries as its metadata."""
    places = {p.name: {"shape": list(p.shape), "start": p.start} for p in pieces}
    return {"pieces": json.dumps(places)}


def share(numel: int, rank: int, world_size: int) -> slice:
    """A rank's run of elements when a tensor is cut as ZeRO-3 does it, without padding.

    >>> share(10, 1, 4), share(10, 3, 4), share(2, 3, 4)
    (slice(3, 6, None), slice(9, 10, None), slice(2, 2, None))
    """
    length = -(-numel // world_size)
    return slice(min(rank * length, numel), min((rank + 1) * length, numel))


class TensorSource(Protocol):
    """Where an engine takes its tensors from when it is loaded."""

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a whole tensor; None if there is none of this name."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[stop − start]: elements of a flattened tensor, on the CPU."""
        ...


class WholeTensors:
    """A source of tensors that are whole in memory, such as an imported model.

    Args:
        tensors: By name, as the training run names its weights (`encoder.…`).
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None if there is none of this name."""
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a flattened tensor."""
        return self._tensors[name].detach().reshape(-1)[start:stop]
