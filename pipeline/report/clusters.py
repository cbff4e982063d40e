"""Clusters of clips as a picture: a row of the nearest clips for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np

from pipeline.errors import StorageError

_SIDE_INCHES = 1.2
_LABEL_INCHES = 0.28


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClusterRow:
    """One cluster: what it is called, and pictures of its clips, uint8 RGB [H, W, 3] each."""

    label: str
    pictures: tuple[np.ndarray, ...]


def draw_clusters(rows: Sequence[ClusterRow], path: Path) -> None:
    """Draws the clusters below one another as a PNG file.

    Raises:
        StorageError: It cannot be written.
    """
    columns = max((len(row.pictures) for row in rows), default=1) or 1
    height = (_SIDE_INCHES + _LABEL_INCHES) * len(rows)
    figure = matplotlib.figure.Figure(figsize=(_SIDE_INCHES * columns, max(height, 1.0)), dpi=100)
    for number, row in enumerate(rows):
        top = 1 - number / len(rows)
        share = _LABEL_INCHES / height
        figure.text(0.005, top - 0.75 * share, row.label, fontsize=8)
        for column, picture in enumerate(row.pictures):
            box = (column / columns, top - 1 / len(rows), 0.98 / columns, 1 / len(rows) - share)
            axis = figure.add_axes(box)
            axis.imshow(_square(picture), interpolation="antialiased", aspect="auto")
            axis.set_axis_off()
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _square(picture_HWC: np.ndarray) -> np.ndarray:
    height, width = picture_HWC.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture_HWC[top : top + side, left : left + side]
