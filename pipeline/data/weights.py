"""A dataset's sampling weights: `weights.npy`, one float32 per sample in the order of the index.

Drawing by weight is the inverse of the cumulative distribution. The weights stay a memory map;
what a process keeps is one partial sum per thousand samples, so a draw reads one page.
"""

import io
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.layout import MANIFEST_NAME, WEIGHTS_NAME
from pipeline.data.manifest import file_sha256, manifest_text, read_manifest, write_durably
from pipeline.errors import DataError, StorageError, UsageError

_BLOCK = 1024
_WRITE_AGAIN = "Write the weights again, or fetch a whole copy of the dataset."


class WeightTable:
    """Which sample lies at a share of the whole weight; pickles without the weights themselves.

    Args:
        path: The file of the weights.
        num_samples: How many there must be.

    Raises:
        StorageError: It cannot be read.
        DataError: It is no array of that many weights, or they are not all at least 0, or all 0.
    """

    def __init__(self, path: Path, num_samples: int) -> None:
        self._path = path
        weights = _mapped(path)
        if weights.dtype != np.dtype("<f4") or weights.shape != (num_samples,):
            raise DataError(
                f"{path}: expected float32 [{num_samples}], got {weights.dtype} "
                f"{list(weights.shape)}",
                remedy=_WRITE_AGAIN,
            )
        # The weight of all samples up to the end of each block.
        self._ends = np.cumsum(_block_sums(weights, path))
        if not self._ends[-1] > 0:
            raise DataError(f"{path}: all weights are 0", remedy=_WRITE_AGAIN)

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_ends": self._ends}

    def sample_at(self, share: float) -> int:
        """The sample at `share` of the whole weight, 0 ≤ share < 1; never one of weight 0."""
        total = float(self._ends[-1])
        target = min(share * total, math.nextafter(total, 0.0))
        block = int(np.searchsorted(self._ends, target, side="right"))
        before = float(self._ends[block - 1]) if block else 0.0
        weights = self._weights[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64)
        inside = int(np.searchsorted(np.cumsum(weights), target - before, side="right"))
        if inside == len(weights):
            # Rounded to beyond the block's last sample that has a weight.
            inside = int(np.flatnonzero(weights)[-1])
        return block * _BLOCK + inside

    @cached_property
    def _weights(self) -> np.ndarray:
        return _mapped(self._path)


def write_weights(dataset_dir: Path, weights: Sequence[float] | np.ndarray) -> str:
    """Gives a finished dataset sampling weights, or others in place of those it has.

    Args:
        dataset_dir: The dataset.
        weights: One per sample, in the order of the index; at least 0, in any unit.

    Returns:
        The file's SHA-256, which the manifest lists from now on.

    Raises:
        UsageError: There is no finished dataset, or the weights are of another number.
        DataError: They are not finite, negative, or all 0.
        StorageError: The folder cannot be written.
    """
    manifest = read_manifest(dataset_dir)
    path = dataset_dir / WEIGHTS_NAME
    array = np.asarray(weights, dtype="<f4")
    if array.shape != (manifest.num_samples,):
        raise UsageError(
            f"{dataset_dir}: expected {manifest.num_samples} weights, got {list(array.shape)}",
            remedy="Give one weight per sample, in the order of index.npy.",
        )
    if not _checked(array, path, 0).any():
        raise DataError(f"{path}: all weights are 0", remedy=_WRITE_AGAIN)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    write_durably(path, buffer.getvalue())
    digest = file_sha256(path)
    changed = manifest.model_copy(update={"weights_sha256": digest})
    write_durably(dataset_dir / MANIFEST_NAME, manifest_text(changed))
    return digest


def open_weights(dataset_dir: Path, num_samples: int, sha256: str) -> WeightTable:
    """The weights that a manifest lists.

    Raises:
        StorageError: They cannot be read.
        DataError: They are not the ones that the manifest lists, or no weights.
    """
    path = dataset_dir / WEIGHTS_NAME
    if file_sha256(path) != sha256:
        raise DataError(
            f"{path}: its SHA-256 differs from the one in {MANIFEST_NAME}", remedy=_WRITE_AGAIN
        )
    return WeightTable(path, num_samples)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: no weights: {error}", remedy=_WRITE_AGAIN) from error


def _block_sums(weights: np.ndarray, path: Path) -> np.ndarray:
    """The weight of each block, added up one by one: `sum` gives other bits on other machines."""
    parts = []
    for first in range(0, len(weights), _BLOCK * _BLOCK):
        part = _checked(weights[first : first + _BLOCK * _BLOCK], path, first)
        padded = np.pad(part, (0, -len(part) % _BLOCK)).reshape(-1, _BLOCK)
        parts.append(np.cumsum(padded, axis=1)[:, -1])
    return np.concatenate(parts) if parts else np.zeros(1)


def _checked(weights: np.ndarray, path: Path, first: int) -> np.ndarray:
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        number = int(wrong[0])
        raise DataError(
            f"{path}: expected weights of at least 0, sample {first + number} has "
            f"{weights[number]}",
            remedy=_WRITE_AGAIN,
        )
    return weights.astype(np.float64)
