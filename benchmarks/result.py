"""How every benchmark keeps its figures: one JSON file with the machine they were taken on."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from pipeline.environment import git_commit, machine

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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {
        "benchmark": name,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git_commit(Path(__file__).parent),
        # Other work on the machine disturbs wall times; the load says how far to trust them.
        "machine": machine() | {"load_1min": round(psutil.getloadavg()[0], 2)},
        "settings": dict(settings),
        "figures": dict(figures),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def spread(rounds: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    return {
        "median": round(statistics.median(rounds), digits),
        "min": round(min(rounds), digits),
        "max": round(max(rounds), digits),
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Show rows on the terminal; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
