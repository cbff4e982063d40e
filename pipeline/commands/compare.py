"""`jepa compare`: several runs side by side."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table as RichTable

from pipeline.commands import JsonFlag, print_json, print_text
from pipeline.errors import StorageError, UsageError
from pipeline.files import write_atomically
from pipeline.report.compare import MOST_RUNS, SideBySide, render_comparison, side_by_side
from pipeline.report.facts import gather


def compare(
    *runs: Annotated[Path, Parameter(help="Folders of two to eight runs.")],
    html: Path | None = None,
    json: JsonFlag = False,
) -> None:
    """Compare runs: how they stand, probe scores, stages, and the settings that differ.

    Args:
        runs: Folders of runs; they may be going on.
        html: Write a page with the curves on top of each other, too.
        json: Print the tables as JSON.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UsageError(
            f"expected from 2 to {MOST_RUNS} runs to compare, got {len(runs)}",
            remedy="jepa compare runs/ONE runs/OTHER [--html FILE]",
        )
    facts = [gather(run) for run in runs]
    found = side_by_side(facts)
    if html is not None:
        try:
            write_atomically(html, render_comparison(facts, found))
        except OSError as error:
            raise StorageError(f"Cannot write {html}: {error.strerror or error}") from error
    if json:
        print_json({**found.document(), "html": None if html is None else str(html)})
        return
    console = Console(highlight=False)
    for part in _tables(found):
        console.print(part)
    # Unwrapped: people and scripts copy the path.
    print_text(str(html) if html else "--html FILE draws the curves.")


def _tables(found: SideBySide) -> list[RichTable]:
    shown = []
    for one in found.tables:
        if not one.rows:
            continue
        table = RichTable(title=one.title, title_justify="left", box=None, header_style="bold")
        table.add_column("", overflow="fold")  # keys cut short would look alike
        for name in found.names:
            table.add_column(name, overflow="fold")
        for row in one.rows:
            table.add_row(row.name, *row.values)
        shown.append(table)
    return shown
