"""Any slice of any tensor of a commit, whatever number of ranks wrote it and asks for it.

Files are opened when a slice needs them, the asking rank's own first: at the world size of the
save a rank reads nothing of weights and moments but its own files.
"""

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint import layout
from pipeline.checkpoint.pieces import Piece
from pipeline.errors import CheckpointError

_FILE = re.compile(r"(weights|optimizer)-rank(\d+)\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a piece of a tensor lies."""

    file: Any
    start: int
    stop: int


class CommitTensors:
    """The tensors of a verified commit by name, read a slice at a time.

    Args:
        commit_dir: Folder of the commit.
        rank: Who asks; decides which files are looked into first.
        world_size: How many ask.
        with_optimizer: Also offer Adam's state.
    """

    def __init__(
        self,
        commit_dir: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        with_optimizer: bool = True,
    ) -> None:
        self._commit_dir = commit_dir
        manifest = layout.read_manifest(commit_dir)
        kinds = ("weights", "optimizer") if with_optimizer else ("weights",)
        found = (_FILE.fullmatch(entry.path) for entry in manifest.files)
        files = [(int(f[2]), kinds.index(f[1]), f[0]) for f in found if f and f[1] in kinds]
        # Ranks cut tensors in their order, so what this rank needs lies near its own place; step
        # counts stand with the first element, which mostly is the first rank's.
        place = rank * manifest.world_size // world_size
        files.sort(key=lambda file: (file[0] not in (place, 0), abs(file[0] - place), file[1]))
        self._unopened = [path for _, _, path in files]
        self._known = manifest.fingerprints.keys()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[_Place]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """All tensors of the commit, in the order of its files."""
        while self._unopened:
            self._open_next()
        return list(self._shapes)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a whole tensor; None if the commit has none of this name."""
        if self._known and name not in self._known:
            return None  # without opening all files for it
        while name not in self._shapes and self._unopened:
            self._open_next()
        return self._shapes.get(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[stop − start]: elements of a flattened tensor.

        Raises:
            CheckpointError: No file holds some of them.
        """
        found, parts = start, []
        while found < stop:
            place = self._place_of(name, found)
            end = min(stop, place.stop)
            piece = place.file.get_slice(name)
            parts.append(piece[found - place.start : end - place.start])
            found = end
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, name: str) -> Tensor:
        """A whole tensor in its shape.

        Raises:
            CheckpointError: The commit has no such tensor.
        """
        shape = self.shape_of(name)
        if shape is None:
            raise CheckpointError(f"{self._commit_dir} holds no tensor {name}.")
        return self.read(name, 0, torch.Size(shape).numel()).reshape(shape)

    def pieces(self, name: str) -> list[Piece]:
        """All pieces of a tensor as they were written, by rising start."""
        shape = self._shapes[name]
        places = sorted(self._places[name], key=lambda place: place.start)
        return [
            Piece(name=name, shape=shape, start=place.start, flat=place.file.get_tensor(name))
            for place in places
        ]

    def _place_of(self, name: str, element: int) -> _Place:
        while True:
            for place in self._places.get(name, ()):
                if place.start <= element < place.stop:
                    return place
            if not self._unopened:
                raise CheckpointError(
                    f"{self._commit_dir}: no file holds element {element} of {name}."
                )
            self._open_next()

    def _open_next(self) -> None:
        path = self._commit_dir / self._unopened.pop(0)
        try:
            file: Any = self._stack.enter_context(safe_open(path, framework="pt"))
            pieces = json.loads(file.metadata()["pieces"])
            for name, place in pieces.items():
                length = file.get_slice(name).get_shape()[0]
                self._note(
                    name,
                    tuple(place["shape"]),
                    _Place(file=file, start=place["start"], stop=place["start"] + length),
                )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no file of pieces: {error!r}") from error

    def _note(self, name: str, shape: tuple[int, ...], place: _Place) -> None:
        if self._shapes.setdefault(name, shape) != shape:
            raise CheckpointError(
                f"{self._commit_dir}: {name} has shape {shape} in one file, "
                f"{self._shapes[name]} in another."
            )
        self._places.setdefault(name, []).append(place)
