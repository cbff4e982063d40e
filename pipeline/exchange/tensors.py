"""Named tensors that are read one at a time, and files of them written one at a time."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError, StorageError

# Large enough for few files, small enough that one fits into the memory of any machine.
SHARD_BYTES = 2 << 30
_MAX_JSON_BYTES = 16 << 20
_FLOATING = ("F64", "F32", "F16", "BF16")

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """Tensors by name, of which none is in memory before it is asked for."""

    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.shapes:
            yield name, self.read(name)

    def finite(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors one after the other, as iterating gives them.

        Raises:
            CheckpointError: One of them holds a number that is not finite.
        """
        for name, tensor in self:
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{name} holds numbers that are not finite, so these networks compute nothing.",
                    remedy="Take an older checkpoint, or fetch the file again.",
                )
            yield name, tensor

    def below(self, prefix: str) -> "Tensors":
        """Those whose names begin with `prefix`, by the rest of their names."""
        found = {n.removeprefix(prefix): s for n, s in self.shapes.items() if n.startswith(prefix)}
        return Tensors(shapes=found, read=lambda name: self.read(prefix + name))

    def above(self, prefix: str) -> "Tensors":
        """The same with `prefix` before every name."""
        shapes = {prefix + name: shape for name, shape in self.shapes.items()}
        return Tensors(shapes=shapes, read=lambda name: self.read(name.removeprefix(prefix)))


def of_dict(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are in memory, or mapped into it, already."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Tensors(shapes=shapes, read=lambda name: tensors[name])


def joined(*parts: Tensors) -> Tensors:
    """Several collections whose names differ, as one."""
    home = {name: part for part in parts for name in part.shapes}
    shapes = {name: part.shapes[name] for name, part in home.items()}
    return Tensors(shapes=shapes, read=lambda name: home[name].read(name))


def open_safetensors(paths: Iterable[Path]) -> Tensors:
    """All tensors of some files; the files stay mapped as long as the result lives.

    Raises:
        CheckpointError: A file is no safetensors file, two hold a tensor of one name, or one holds
            other than floating numbers of 16 bits or more.
    """
    home: dict[str, Any] = {}
    shapes: dict[str, Shape] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing.", remedy="Fetch the folder again.") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors: {error}", remedy="Fetch the file again."
            ) from error
        for name in file.keys():  # noqa: SIM118 - no dictionary
            if name in home:
                raise CheckpointError(f"{path}: tensor {name} is in another file too.")
            facts = file.get_slice(name)
            kind = facts.get_dtype()
            if kind not in _FLOATING:
                raise CheckpointError(
                    f"{path}: tensor {name} is {kind}, expected {', '.join(_FLOATING)}.",
                    remedy="Quantised weights mean nothing without their scales: take full ones.",
                )
            home[name] = file
            shapes[name] = tuple(facts.get_shape())
    return Tensors(shapes=shapes, read=lambda name: home[name].get_tensor(name))


def write_safetensors(
    folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, str]:
    """Writes tensors as they come, as many files as it takes; no more than one is in memory.

    Args:
        folder: An existing folder.
        stem: `model` gives model.safetensors, or model-00001-of-00002.safetensors and so on.
        tensors: Names and tensors.

    Returns:
        The file of each tensor, by the tensor's name.

    Raises:
        StorageError: A file cannot be written.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        size = sum(one.nbytes for one in held.values()) + tensor.nbytes
        if held and size > SHARD_BYTES:
            shards.append(_write_shard(folder, f"{stem}-part{len(shards)}", held))
            held = {}
        # A clone: a view would keep the whole tensor that it is cut from.
        held[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    if held or not shards:
        shards.append(_write_shard(folder, f"{stem}-part{len(shards)}", held))
    home = {}
    for number, names in enumerate(shards):
        of_all = f"-{number + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        final = f"{stem}{of_all}.safetensors"
        (folder / f"{stem}-part{number}.safetensors").rename(folder / final)
        home.update(dict.fromkeys(names, final))
    return home


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object.

    Raises:
        CheckpointError: It is missing, too large, or something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.", remedy="Is it the right folder?") from None
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror}") from error
    try:
        content = json.loads(text) if len(text) <= _MAX_JSON_BYTES else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object of at most 16 MiB.")
    return content


def _write_shard(folder: Path, stem: str, tensors: dict[str, Tensor]) -> list[str]:
    path = folder / f"{stem}.safetensors"
    try:
        # transformers refuses files that do not say which library's layout they have.
        save_file(tensors, path, {"format": "pt"})
        path.chmod(0o644)  # the library makes it the owner's alone
    except (SafetensorError, OSError) as error:
        raise StorageError(f"Cannot write {path}: {error}") from error
    return list(tensors)
