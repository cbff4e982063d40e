"""The whole page: one HTML file that needs no other."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.files import write_atomically
from pipeline.report.choices import choices_section
from pipeline.report.confusion import confusion_section
from pipeline.report.curves import features_section, loss_section, schedule_section, speed_section
from pipeline.report.facts import RunFacts, gather
from pipeline.report.features import FeatureMapRow
from pipeline.report.head import head
from pipeline.report.html import text
from pipeline.report.masks import masks_section
from pipeline.report.probes import compare
from pipeline.report.style import CSS
from pipeline.report.tables import (
    config_section,
    events_section,
    maps_section,
    probe_section,
    stage_section,
    time_section,
)
from pipeline.track.folder import PROBE_FOLDER, REPORT_FILE


def write_report(
    run_dir: Path,
    *,
    feature_maps: Sequence[FeatureMapRow] | None = None,
    out: Path | None = None,
    left_out: str = "",
) -> Path:
    """Writes a run's report; works on a run that goes on as well as on one that has ended.

    Args:
        run_dir: The run's folder.
        feature_maps: Rows of `feature_map_rows`; left out of the page without them.
        out: The file to write; report.html in the run's folder by default.
        left_out: Why there are no feature maps, for the page.

    Returns:
        The file that was written.

    Raises:
        UsageError: `run_dir` is no run's folder.
        StorageError: The file cannot be written.
    """
    path = out or run_dir / REPORT_FILE
    html = render(gather(run_dir), feature_maps, left_out)
    try:
        # File names are bytes; what is no UTF-8 in them is written by its number.
        write_atomically(path, html.encode("utf-8", "backslashreplace"))
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"Cannot write the report to {path}: {reason}") from error
    return path


def render(
    facts: RunFacts, feature_maps: Sequence[FeatureMapRow] | None = None, left_out: str = ""
) -> str:
    """The page's HTML."""
    comparisons = compare(facts.probes)
    name = facts.run_dir.resolve().name
    written = datetime.fromtimestamp(facts.now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    body = (
        head(facts, comparisons),
        probe_section(facts, comparisons),
        confusion_section(facts.run_dir / PROBE_FOLDER),
        loss_section(facts),
        features_section(facts),
        maps_section(facts, feature_maps, left_out),
        stage_section(facts),
        masks_section(facts.config),
        speed_section(facts),
        time_section(facts),
        choices_section(facts),
        schedule_section(facts),
        events_section(facts),
        config_section(facts),
        f"<footer>Written {written} from {text(facts.run_dir)} by jepa report.</footer>",
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(name)} · jepa</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
