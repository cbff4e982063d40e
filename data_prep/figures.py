"""What a dataset consists of, counted while its records go by: the manifest's histograms.

Memory does not depend on the number of records.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import JsonValue

from data_prep.records import ItemRecord, SegmentRecord

# Lengths from one second to several hours stand on one axis, and so do all rates and sizes.
_EDGES: dict[str, tuple[float, ...]] = {
    "source_seconds": (0, 1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096),
    "source_short_side": (0, 64, 128, 192, 256, 288, 320, 384, 480, 540, 720, 1080, 2160),
    "source_fps": (0, 2, 4, 6, 8, 10, 12, 16, 24, 25, 30, 50, 60, 120),
    "seconds": (0, 1, 2, 4, 8, 16, 32, 64, 128),
    "short_side": (0, 64, 128, 192, 256, 288, 320, 384, 480, 540, 720, 1080),
    "motion": (0, 1, 2, 5, 10, 20, 40, 80, 160),
    "still_share": (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1),
    "black_share": (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1),
}
# A rate of 29.97 or a length of 3.9999 belongs where a person looks for it.
_ROUNDED = 1e-3


def figures_of(records: Iterable[ItemRecord]) -> dict[str, JsonValue]:
    """Counts sources and their kept segments; goes into `manifest.json` as `figures`.

    A histogram has `edges` and one count for each: count n is of edges[n] ≤ x < edges[n + 1], the
    last of all from the last edge on. Motion is in grey levels of 255 a second.

    Args:
        records: What became of every source, with the segments that are in the dataset.
    """
    counts = {name: [0] * len(edges) for name, edges in _EDGES.items()}
    codecs: Counter[str] = Counter()
    num_sources = num_used = 0
    source_seconds = 0.0
    for record in records:
        num_sources += 1
        source_seconds += record.seconds
        num_used += bool(record.segments)
        if record.codec:
            codecs[record.codec] += 1
            _count(counts, _of_source(record))
        for segment in record.segments:
            _count(counts, _of_segment(segment))
    return {
        "sources": num_sources,
        "sources_used": num_used,
        "source_hours": round(source_seconds / 3600, 6),
        "source_codecs": dict(sorted(codecs.items())),
        "histograms": {
            name: {"edges": list(_EDGES[name]), "counts": list(bins)}
            for name, bins in counts.items()
        },
    }


def _of_source(record: ItemRecord) -> dict[str, float]:
    return {
        "source_seconds": record.seconds,
        "source_short_side": min(record.width, record.height),
        "source_fps": record.fps,
    }


def _of_segment(segment: SegmentRecord) -> dict[str, float]:
    return {
        "seconds": segment.end_seconds - segment.start_seconds,
        "short_side": min(segment.width, segment.height),
        "motion": segment.figures.motion,
        "still_share": segment.figures.still_share,
        "black_share": segment.figures.black_share,
    }


def _count(counts: dict[str, list[int]], values: dict[str, float]) -> None:
    for name, value in values.items():
        counts[name][_bin(_EDGES[name], value)] += 1


def _bin(edges: Sequence[float], value: float) -> int:
    return max(0, bisect_right(edges, value + _ROUNDED) - 1)
