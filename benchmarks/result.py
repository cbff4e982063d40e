"""Where the benchmarks of this repository keep their figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.bench.result import document, print_table, spread, write_document

__all__ = ["RESULTS", "print_table", "spread", "write_result"]

RESULTS = Path(__file__).parent / "results"


def write_result(
    name: str, figures: Mapping[str, Any], settings: Mapping[str, Any], *, folder: Path = RESULTS
) -> Path:
    """Write `NAME.json`: figures, the settings they were measured with, machine and commit.

    Args:
        name: Name of the benchmark; its file's stem.
        figures: What was measured; names carry units.
        settings: What it was measured with.
        folder: Where the file goes.

    Returns:
        The file that was written.
    """
    path = folder / f"{name}.json"
    write_document(path, document(name, figures, settings))
    return path
