"""A picture of all classes: one strip of frames each, in the order of time."""

from pathlib import Path

import matplotlib.figure
import numpy as np
from numpy.typing import NDArray

from data_prep.synthetic.classes import PAIRS
from data_prep.synthetic.knobs import ClipShape
from data_prep.synthetic.render import render
from data_prep.synthetic.scene import compose

_FRAMES_PER_STRIP = 8
# Apart from the streams of the clips, so that the sheet shows none of the data set's own.
_SHEET_STREAM = 3


def write_sheet(path: Path, *, seed: int, num_pairs: int, shape: ClipShape) -> None:
    """Draw `classes.png`: a pair's two classes side by side, both from one scene.

    The right strip of a row therefore holds the frames of another moment of the same video,
    which makes visible that only their order tells the class.
    """
    inches = 1.1
    figure = matplotlib.figure.Figure(
        figsize=(2 * _FRAMES_PER_STRIP * inches, num_pairs * (inches + 0.3)), dpi=90
    )
    axes = figure.subplots(num_pairs, 2, squeeze=False)
    for row, pair in enumerate(PAIRS[:num_pairs]):
        for column, backward in enumerate((False, True)):
            rng = np.random.default_rng([seed, _SHEET_STREAM, row])
            scene = compose(rng, pair, backward, shape)
            axis = axes[row, column]
            axis.imshow(_strip(render(scene, shape)), interpolation="nearest")
            axis.set_title(scene.sentence, fontsize=8, pad=3)
            axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    figure.savefig(path, format="png", metadata={"Software": None})


def _strip(frames_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames at equal distances beside one another, a white line between."""
    chosen = np.linspace(0, len(frames_THWC) - 1, _FRAMES_PER_STRIP).round().astype(int)
    bordered = np.pad(frames_THWC[chosen], ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return np.concatenate(list(bordered), axis=1)
