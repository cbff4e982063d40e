"""Pieces of features on disk: each a fixed range of videos, encoded and checked by itself.

CACHE/KEY/chunk-00000.safetensors   pooled steps in fp32, tokens in bf16 where they are kept
CACHE/KEY/chunk-00000.json          its digest, whose videos it holds, those that are bad; last

A chunk's content depends on the request and its number alone, so it does not matter which process
made it, and a process that dies takes nothing away but the chunk it was at.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.clip import SampleFault
from pipeline.errors import StorageError
from pipeline.files import sha256_of, write_atomically
from pipeline.probe.annotations import LabelledVideo, Split
from pipeline.probe.features import LiveInputs, num_tokens, step_means
from pipeline.probe.frozen import FrozenEncoder
from pipeline.probe.shards import dataset_digest
from pipeline.probe.tasks import Augmentation, TaskConfig

_FORMAT = 3  # raised when the same inputs would give other files
_CHUNK_BYTES, _MOST_ROWS = 64 << 20, 256
_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """What features are asked for.

    `num_views` are the crops of each video; `keep_tokens` keeps all tokens, not only the mean of
    each time step.
    """

    encoder: FrozenEncoder
    split: Split
    task: TaskConfig
    num_views: int
    keep_tokens: bool

    @property
    def token_bytes(self) -> int:
        """Size of the tokens of one video in bf16."""
        return 2 * num_tokens(self.encoder, self.task.clip) * self.encoder.width * self.num_views

    @property
    def step_bytes(self) -> int:
        """Size of the pooled features of one video in fp32."""
        grid, clip = self.encoder.grid, self.task.clip
        steps = num_tokens(self.encoder, clip) // (grid.h * grid.w)
        return 4 * steps * clip.cells**2 * self.encoder.width * self.num_views

    @property
    def total_gib(self) -> float:
        """What this takes on disk."""
        per_video = self.step_bytes + (self.token_bytes if self.keep_tokens else 0)
        return per_video * len(self.split.videos) / _GIB

    def key(self) -> str:
        """Digest over everything that the features depend on."""
        identity = {
            "format": _FORMAT,
            "encoder": self.encoder.digest,
            "autocast": str(self.encoder.autocast),
            "clip": self.task.clip.model_dump(mode="json", exclude={"views"}),
            "views": self.num_views,
            "tokens": self.keep_tokens,
            "videos": [_identity(video) for video in self.split.videos],
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]

    def both(self) -> tuple["Extraction", "Extraction"]:
        """The same with tokens and without."""
        return replace(self, keep_tokens=True), replace(self, keep_tokens=False)

    def chunks(self) -> list[range]:
        """Places of the videos of each chunk."""
        total = len(self.split.videos)
        per_video = self.step_bytes + (self.token_bytes if self.keep_tokens else 0)
        rows = max(1, min(_MOST_ROWS, _CHUNK_BYTES // max(1, per_video)))
        return [range(first, min(first + rows, total)) for first in range(0, total, rows)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A whole chunk on disk."""

    path: Path
    positions: tuple[int, ...]
    """Places of its rows in the split."""
    faults: tuple[SampleFault, ...]


def encode_chunk(asked: Extraction, folder: Path, number: int) -> Chunk:
    """Encodes the videos of one chunk and puts it into the folder.

    Raises:
        DataError: More videos of it are bad than are tolerated of the whole split.
        StorageError: It cannot be written.
    """
    places = asked.chunks()[number]
    still = asked.task.model_copy(update={"augmentation": Augmentation()})
    source = LiveInputs(asked.encoder, asked.split, still, num_views=asked.num_views, rounded=False)
    steps: list[Tensor] = []
    tokens: list[Tensor] = []
    positions: list[int] = []
    order = torch.arange(places.start, places.stop)
    for batch in source.batches(order, asked.task.encode_batch, epoch=None):
        means = step_means(asked.encoder, batch.inputs_BV, asked.task.clip.cells)
        steps.append(means.cpu().contiguous())
        if asked.keep_tokens:
            tokens.append(batch.inputs_BV.bfloat16().cpu())
        positions += batch.index_B.tolist()
    tensors = {"steps": torch.cat(steps)} if steps else {}
    if tokens:
        tensors["tokens"] = torch.cat(tokens)
    faults = tuple(source.faults[index] for index in sorted(source.faults))
    chunk = Chunk(path=_path(folder, number), positions=tuple(positions), faults=faults)
    _write(chunk, save(tensors))
    return chunk


def read_chunk(asked: Extraction, folder: Path, number: int) -> Chunk | None:
    """A chunk that is there and whole, or None: then it has to be encoded."""
    path = _path(folder, number)
    try:
        told: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        chunk = Chunk(
            path=path,
            positions=tuple(int(place) for place in told["positions"]),
            faults=tuple(SampleFault(**fault) for fault in told["faults"]),
        )
        is_whole = told["sha256"] == sha256_of(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    held = {*chunk.positions, *(fault.position for fault in chunk.faults)}
    return chunk if is_whole and held == set(asked.chunks()[number]) else None


def read_steps(chunk: Chunk) -> Tensor | None:
    """Pooled features of a chunk's rows; None if all its videos are bad."""
    if not chunk.positions:
        return None
    with safe_open(chunk.path, framework="pt") as file:
        return file.get_tensor("steps")


class ChunkedTokens:
    """Tokens of all chunks, read row by row through the page cache."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._home = [(chunk.path, row) for chunk in chunks for row in range(len(chunk.positions))]
        self._open: dict[Path, Any] = {}

    def rows(self, index_B: Tensor) -> Tensor:
        """Tokens [B, V, N, D] of some rows, bf16.

        Raises:
            StorageError: A chunk is gone or was changed.
        """
        homes = [self._home[row] for row in index_B.tolist()]
        try:
            return torch.cat([self._slice(path)[row : row + 1] for path, row in homes])
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"features that were there cannot be read any more: {error}",
                remedy="Give the command again: what is missing is encoded again.",
            ) from error

    def _slice(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").get_slice("tokens")
        return self._open[path]


def _identity(video: LabelledVideo) -> tuple[Any, ...]:
    if video.sample is not None:
        return (dataset_digest(video.path), video.sample, video.label)
    stat = video.path.stat()
    return (str(video.path.resolve()), video.label, stat.st_size, stat.st_mtime_ns)


def _path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05d}.safetensors"


def _write(chunk: Chunk, content: bytes) -> None:
    told = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "positions": chunk.positions,
        "faults": [asdict(fault) for fault in chunk.faults],
    }
    try:
        write_atomically(chunk.path, content)
        write_atomically(chunk.path.with_suffix(".json"), json.dumps(told))
    except OSError as error:
        raise StorageError(
            f"cannot keep features in {chunk.path.parent}: {error.strerror or error}",
            remedy="Free space, or probe with tokens=encode.",
        ) from error
