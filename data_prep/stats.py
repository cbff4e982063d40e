"""What a dataset consists of, as numbers and as one picture."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from pipeline.data.format import Member, ShardIndex
from pipeline.data.layout import CODECS

# Lengths from one second to several minutes stand on one axis.
_DURATION_EDGES_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
_RATE_EDGES_FPS = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 25.0, 30.0, 50.0, 60.0, 120.0)
_SIDE_EDGES_PIXELS = (0, 64, 128, 192, 256, 288, 320, 384, 480, 540, 720, 1080, 2160)
_ASPECT_EDGES = (0.0, 0.5, 0.6, 0.8, 0.95, 1.05, 1.25, 1.4, 1.6, 1.85, 2.4, 4.0)
_RATE_EDGES_KBPS = (0, 50, 100, 200, 400, 600, 800, 1200, 1600, 2400, 4800)

# What is drawn of the manifest's own histograms.
_COUNTED = {
    "motion": "motion [grey levels a second]",
    "still_share": "share of still pictures",
    "source_seconds": "sources: duration [s]",
    "source_fps": "sources: frame rate [fps]",
    "source_short_side": "sources: short side [pixels]",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How often a figure falls between two edges: bin n holds edges[n] ≤ x < edges[n + 1].

    The last bin also takes everything above its upper edge.
    """

    name: str
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    smallest: float
    median: float
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """A histogram of the manifest, counted when the dataset was prepared.

    Bin n holds edges[n] ≤ x < edges[n + 1], the last everything from the last edge on.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetStats:
    """The figures of one dataset."""

    dataset: str
    digest: str
    num_samples: int
    num_shards: int
    hours: float
    video_bytes: int
    num_frames: int
    codecs: dict[str, int]
    members: dict[str, int]
    """Samples that have each kind of member."""
    histograms: tuple[Histogram, ...]
    counted: tuple[Counted, ...]
    """Of what the index does not know: motion, and the sources; empty for foreign shards."""
    source_codecs: dict[str, int]


def dataset_stats(dataset: Path) -> DatasetStats:
    """Counts a dataset from its index; no video is opened.

    Raises:
        UsageError: There is no finished dataset.
        DataError: A file is missing or has another size or digest than the manifest says.
    """
    index = ShardIndex.open(dataset)
    rows = index.records
    sides = np.stack([rows["width"], rows["height"]]).astype(np.float64)
    seconds, video = rows["duration_seconds"], rows[str(Member.VIDEO)]["length"].astype(np.float64)
    kbps = 8e-3 * video / np.maximum(seconds, 1e-9)
    aspect = sides[0] / np.maximum(sides[1], 1)
    return DatasetStats(
        dataset=str(dataset),
        digest=index.digest,
        num_samples=len(rows),
        num_shards=len(index.manifest.shards),
        hours=index.manifest.hours,
        video_bytes=int(video.sum()),
        num_frames=int(rows["num_frames"].sum()),
        codecs={
            CODECS[number]: count
            for number, count in sorted(Counter(rows["codec"].tolist()).items())
        },
        members={str(m): int((rows[str(m)]["length"] > 0).sum()) for m in Member},
        histograms=(
            _histogram("duration", "s", seconds, _DURATION_EDGES_SECONDS),
            _histogram("frame rate", "fps", rows["fps"], _RATE_EDGES_FPS),
            _histogram("short side", "pixels", sides.min(axis=0), _SIDE_EDGES_PIXELS),
            _histogram("aspect", "width / height", aspect, _ASPECT_EDGES),
            _histogram("bit rate", "kbit/s", kbps, _RATE_EDGES_KBPS),
        ),
        counted=_counted(index.manifest.figures),
        source_codecs=cast("dict[str, int]", index.manifest.figures.get("source_codecs", {})),
    )


def draw(stats: DatasetStats, path: Path) -> None:
    """Draws the histograms, the codecs and the members as one PNG file.

    Raises:
        OSError: It cannot be written.
    """
    num_rows = 2 + -(-len(stats.counted) // 3)
    figure = matplotlib.figure.Figure(figsize=(11.0, 3.2 * num_rows), dpi=110)
    axes = figure.subplots(num_rows, 3).ravel()
    for axis, histogram in zip(axes, stats.histograms, strict=False):
        labels = _bin_labels(histogram.edges)
        _bars(axis, labels, histogram.counts, f"{histogram.name} [{histogram.unit}]")
    names = {f"codec {name}": count for name, count in stats.codecs.items()}
    names |= {f"has {name}": count for name, count in stats.members.items() if count}
    names |= {f"from {name}": count for name, count in stats.source_codecs.items()}
    _bars(axes[5], list(names), list(names.values()), "samples by codec and member; sources")
    for axis, counted in zip(axes[6:], stats.counted, strict=False):
        _bars(axis, _bin_labels((*counted.edges, 0.0)), counted.counts, counted.name)
    for axis in axes[6 + len(stats.counted) :]:
        axis.set_axis_off()
    figure.suptitle(
        f"{stats.dataset}: {stats.num_samples} samples, {stats.hours:.2f} hours, "
        f"{stats.video_bytes / 2**20:.1f} MiB of video in {stats.num_shards} shards",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, format="png", metadata={"Software": None})


def _counted(figures: Mapping[str, Any]) -> tuple[Counted, ...]:
    known = figures.get("histograms", {})
    return tuple(
        Counted(name=title, edges=tuple(known[key]["edges"]), counts=tuple(known[key]["counts"]))
        for key, title in _COUNTED.items()
        if key in known
    )


def _histogram(name: str, unit: str, values: np.ndarray, edges: Sequence[float]) -> Histogram:
    numbers = np.asarray(values, dtype=np.float64)
    bins = np.searchsorted(np.asarray(edges), numbers, side="right") - 1
    counts = np.bincount(np.clip(bins, 0, len(edges) - 2), minlength=len(edges) - 1)
    low, middle, high = (
        (float(numbers.min()), float(np.median(numbers)), float(numbers.max()))
        if len(numbers)
        else (0.0, 0.0, 0.0)
    )
    return Histogram(
        name=name,
        unit=unit,
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
        smallest=round(low, 3),
        median=round(middle, 3),
        largest=round(high, 3),
    )


def _bin_labels(edges: Sequence[float]) -> list[str]:
    labels = [f"{low:g}–{high:g}" for low, high in pairwise(edges[:-1])]
    return [*labels, f"≥ {edges[-2]:g}"]


def _bars(axis: Axes, labels: Sequence[str], counts: Sequence[int], title: str) -> None:
    places = np.arange(len(labels))
    axis.barh(places, counts, color="#3b6ea5", height=0.8)
    axis.set_yticks(places, labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    for place, count in enumerate(counts):
        if count:
            axis.text(count, place, f" {count}", va="center", fontsize=7)
    axis.margins(x=0.14)
