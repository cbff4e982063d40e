"""Probe results as a page of their own: for weights that belong to no run."""

from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.files import write_atomically
from pipeline.report.confusion import confusion_section
from pipeline.report.html import percent, section, table, text
from pipeline.report.style import CSS
from pipeline.track.folder import probe_records

PROBE_PAGE = "probes.html"
_HEADINGS = ("task", "weights", "head", "seed", "top-1", "95 % interval", "chance", "clips")


def write_probe_page(folder: Path) -> Path:
    """Writes scores, confusion and hardest clips of all results in a folder.

    Args:
        folder: `RUN/probes`, or the folder that `jepa probe --out` was given.

    Returns:
        The page.

    Raises:
        StorageError: A result cannot be read, or the page not be written.
    """
    records = [record for path in sorted(folder.glob("*.json")) for record in probe_records(path)]
    title = f"Probes of {(folder.parent if folder.name == 'probes' else folder).resolve().name}"
    scores = section("Scores", table(_HEADINGS, [_row(one) for one in records], words=3))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)} · jepa</title><style>{CSS}</style></head><body><main>"
        f"<h1>{text(title)}</h1>{scores}{confusion_section(folder)}</main></body></html>\n"
    )
    path = folder / PROBE_PAGE
    try:
        write_atomically(path, page)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _row(record: dict[str, Any]) -> tuple[object, ...]:
    step, chance = record.get("step"), record.get("chance")
    weights = "imported" if step is None else f"step {step}"
    low, high = record.get("top1_interval") or (None, None)
    return (
        record.get("task"),
        f"{weights}, {record.get('which', 'teacher')}",
        record.get("head"),
        record.get("seed"),
        percent(record["top1"]),
        "–" if low is None else f"{percent(low)} – {percent(high)}",
        "–" if chance is None else percent(chance),
        record.get("num_val"),
    )
