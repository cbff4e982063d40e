"""Features on disk: encoded once for an encoder and a split, found again by what they come from."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from pipeline.clip import SampleFault
from pipeline.errors import StorageError
from pipeline.probe.annotations import Split
from pipeline.probe.features import Features, LiveInputs, num_tokens, step_means
from pipeline.probe.frozen import FrozenEncoder
from pipeline.probe.tasks import Augmentation, TaskConfig

_FORMAT = 2  # raised when the same inputs would give other files
_META, _STEPS, _TOKENS, _LABELS = "features.json", "steps.npy", "tokens.npy", "labels.npy"
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
    def token_gib(self) -> float:
        """Size of all tokens in fp16."""
        numbers = num_tokens(self.encoder, self.task.clip) * self.encoder.width
        return 2 * numbers * self.num_views * len(self.split.videos) / _GIB

    def key(self) -> str:
        """Digest over everything that the features depend on."""
        stats = [(video, video.path.stat()) for video in self.split.videos]
        identity = {
            "format": _FORMAT,
            "encoder": self.encoder.digest,
            "autocast": str(self.encoder.autocast),
            "clip": self.task.clip.model_dump(mode="json", exclude={"views"}),
            "views": self.num_views,
            "tokens": self.keep_tokens,
            "videos": [
                (str(video.path.resolve()), video.label, stat.st_size, stat.st_mtime_ns)
                for video, stat in stats
            ],
        }
        return sha256(json.dumps(identity).encode()).hexdigest()[:24]


def extract(asked: Extraction, cache: Path, report: Callable[[int, int], None]) -> Features:
    """Features of a split: from the cache, or encoded now and put there.

    Args:
        asked: Which features.
        cache: Folder of all cached features; may be emptied at any time.
        report: Told the number of videos done, and their total.

    Raises:
        DataError: Too many videos cannot be decoded.
        StorageError: The folder cannot be written.
    """
    # Features with tokens also serve where none are needed.
    for candidate in (replace(asked, keep_tokens=True), asked):
        found = _open(cache / candidate.key(), asked)
        if found is not None:
            report(len(asked.split.videos), len(asked.split.videos))
            return found
    folder = cache / asked.key()
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write(partial, asked, report)
        _publish(partial, folder)
    except OSError as error:
        raise StorageError(f"cannot keep features in {cache}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    made = _open(folder, asked)
    if made is None:
        raise StorageError(f"features written to {folder} cannot be read back")
    return replace(made, from_cache=False)


def prune(cache: Path, limit_gib: float) -> None:
    """Remove the features used longest ago until the folder keeps to a size."""
    folders = [path.parent for path in cache.glob(f"*/{_META}")]
    sizes = {folder: _num_bytes(folder) for folder in folders}
    for folder in sorted(folders, key=lambda folder: (folder / _META).stat().st_mtime):
        if sum(sizes.values()) <= limit_gib * _GIB:
            return
        shutil.rmtree(folder, ignore_errors=True)
        del sizes[folder]


def _write(folder: Path, asked: Extraction, report: Callable[[int, int], None]) -> None:
    """Encodes every video of the split in order; bad ones are left out and named."""
    encoder, total = asked.encoder, len(asked.split.videos)
    clip, all_tokens = asked.task.clip, num_tokens(encoder, asked.task.clip)
    num_steps = all_tokens // (encoder.grid.h * encoder.grid.w)
    shape = (total, asked.num_views, num_steps, clip.cells**2, encoder.width)
    steps = open_memmap(folder / _STEPS, mode="w+", dtype=np.float32, shape=shape)
    tokens = None
    if asked.keep_tokens:
        shape = (*shape[:2], all_tokens, encoder.width)
        tokens = open_memmap(folder / _TOKENS, mode="w+", dtype=np.float16, shape=shape)
    still = asked.task.model_copy(update={"augmentation": Augmentation()})
    source = LiveInputs(encoder, asked.split, still, num_views=asked.num_views)
    labels: list[int] = []
    for batch in source.batches(torch.arange(total), asked.task.encode_batch, epoch=None):
        rows = slice(len(labels), len(labels) + len(batch.labels_B))
        steps[rows] = step_means(encoder, batch.inputs_BV, clip.cells).cpu().numpy()
        if tokens is not None:
            tokens[rows] = batch.inputs_BV.half().cpu().numpy()
        labels += batch.labels_B.tolist()
        report(len(labels) + len(source.faults), total)
    np.save(folder / _LABELS, np.array(labels, dtype=np.int64))
    faults = [asdict(source.faults[index]) for index in sorted(source.faults)]
    (folder / _META).write_text(json.dumps({"num_clips": len(labels), "faults": faults}))


def _publish(partial: Path, folder: Path) -> None:
    """Makes a whole folder visible under its name, in place of a damaged one.

    Another process may have published the same features in the meantime: they serve as well.
    """
    if folder.exists():
        doomed = partial.with_name(f"{partial.name}-old")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    try:
        partial.replace(folder)
    except OSError:
        if not (folder / _META).is_file():
            raise


def _open(folder: Path, asked: Extraction) -> Features | None:
    """The features in a folder, or None if they are not there or not whole."""
    try:
        meta = json.loads((folder / _META).read_text())
        num_clips = meta["num_clips"]
        steps = np.load(folder / _STEPS, mmap_mode="r", allow_pickle=False)[:num_clips]
        labels = np.load(folder / _LABELS, allow_pickle=False)
        tokens = None
        if asked.keep_tokens:
            tokens = np.load(folder / _TOKENS, mmap_mode="r", allow_pickle=False)[:num_clips]
        faults = tuple(SampleFault(**fault) for fault in meta["faults"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(labels) != num_clips or len(steps) != num_clips:
        return None
    os.utime(folder / _META)
    return Features(
        steps_NVPCD=steps,
        tokens_NVND=tokens,
        labels_N=torch.from_numpy(labels),
        faults=faults,
        from_cache=True,
    )


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
