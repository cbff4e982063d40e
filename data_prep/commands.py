"""The verbs of `jepa prep`."""

import json as json_text
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.display import estimate_text, shown_progress, summary_text
from data_prep.flags import PrepFlags, settings_from
from data_prep.kinds.opening import Kind
from data_prep.synthetic.dataset import SyntheticConfig, write_dataset
from pipeline.errors import ExitCode


def synthetic(
    out: Path,
    config: Annotated[SyntheticConfig | None, Parameter(name="*")] = None,
    *,
    workers: int = 2,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Render labelled synthetic clips whose classes only motion tells apart.

    Writes `OUT/videos/<id>.mp4`, the label files of Something-Something in `OUT/labels`, the
    parameters in `OUT/synthetic.json` and one strip of frames per class in `OUT/classes.png`.
    A second run with the same parameters finishes what is missing and changes nothing else.

    Args:
        out: Folder to write to; made if missing.
        config: What the data set consists of.
        workers: Processes that render; the files do not depend on it.
        overwrite: Replace a synthetic data set of other parameters that stands in OUT.
        json: Print the result as JSON.
    """
    with Progress(
        TextColumn("rendering videos"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("videos", total=None)
        report = write_dataset(
            out,
            config or SyntheticConfig(),
            workers=workers,
            overwrite=overwrite,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if json:
        Console().print_json(json_text.dumps(asdict(report)))
        return
    Console().print(
        f"{report.folder}: {report.num_written} videos written, {report.num_kept} already there, "
        f"{report.num_classes} classes; look at {out / 'classes.png'}",
        soft_wrap=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How `jepa prep run` goes about it; nothing of it changes the dataset's bytes."""

    config: Path | None = None
    """A YAML file with settings; what is given as a flag takes precedence."""
    kind: Kind | None = None
    """What SOURCES are; recognised if left out."""
    videos: str | None = None
    """Folder or address that relative paths in tables start from."""
    workers: PositiveInt | None = None
    """Sources that are worked on at a time; the machine's cores by default."""
    address: str | None = None
    """Join the Ray cluster at host:port, whose machines must all see SOURCES and OUT."""
    dry_run: bool = False
    """Write nothing; prepare a sample in a temporary folder and estimate the whole."""
    overwrite: bool = False
    """Replace a dataset of other sources or settings that stands in OUT."""


def run(
    *sources: str,
    out: Path,
    settings: Annotated[PrepFlags | None, Parameter(name="*")] = None,
    options: Annotated[RunOptions | None, Parameter(name="*")] = None,
    json: bool = False,
) -> ExitCode:
    """Check, cut, filter, transcode and shard videos, and index the shards.

    Lists what SOURCES stand for, refuses what does not decode or is not wanted
    (`OUT/rejected.jsonl` says what and why), and writes `OUT/shard-*.tar`, `OUT/index.npy` and
    `OUT/manifest.json`. The same command again continues where an interrupted run stopped; the
    result has the same bytes. Further SOURCES are appended to a dataset that is finished.

    Args:
        sources: Folders with videos, files, addresses, or other kinds as KIND:PATH; write `--`
            before a name like `-clip.mp4`.
        out: Folder of the dataset; made if missing.
        settings: How the videos are prepared.
        options: Where sources and settings come from, and who works.
        json: Print the result as JSON.
    """
    # Here, because webdataset brings torch, which no other verb of this file needs.
    from data_prep.driver import Stopped, Workers  # noqa: PLC0415
    from data_prep.estimate import estimate  # noqa: PLC0415
    from data_prep.prepare import Inputs, prepare  # noqa: PLC0415

    options = options or RunOptions()
    chosen = settings_from(settings, options.config)
    inputs = Inputs(arguments=sources, kind=options.kind, videos=options.videos)
    where = Workers(num_cpus=options.workers, address=options.address)
    try:
        with shown_progress() as watch:
            if options.dry_run:
                report = estimate(inputs, out, chosen, workers=where, watch=watch)
                text = estimate_text(report)
            else:
                again = options.overwrite
                report = prepare(inputs, out, chosen, workers=where, overwrite=again, watch=watch)
                text = summary_text(report)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"stopped; the same command continues, {out} keeps finished sources\n")
        if isinstance(error, Stopped):
            return ExitCode.SAVED_RUN_AGAIN
        raise
    if json:
        Console().print_json(json_text.dumps(asdict(report)))
    else:
        Console().print(text, soft_wrap=True, highlight=False, markup=False)
    return ExitCode.DONE
