"""How every measurement is kept: one JSON document with the machine that it was taken on."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from pipeline.machine import git_commit, machine


def document(name: str, figures: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with their settings, the machine and the commit of the code.

    Args:
        name: What was measured.
        figures: The figures; names carry units.
        settings: What they were measured with.
    """
    return {
        "benchmark": name,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git_commit(Path(__file__).parent),
        # Other work on the machine disturbs wall times; the load says how far to trust them.
        "machine": machine() | {"load_1min": round(psutil.getloadavg()[0], 2)},
        "settings": dict(settings),
        "figures": dict(figures),
    }


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a document as indented JSON, with the folder that it goes into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def spread(rounds: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    return {
        "median": round(statistics.median(rounds), digits),
        "min": round(min(rounds), digits),
        "max": round(max(rounds), digits),
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Shows rows on the terminal; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
