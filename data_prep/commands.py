"""The verbs of `jepa prep`."""

import json as json_text
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.display import shown_progress, summary_text
from data_prep.settings import PrepSettings
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


def run(
    *sources: Path,
    out: Path,
    settings: Annotated[PrepSettings | None, Parameter(name="*")] = None,
    workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> ExitCode:
    """Check, transcode, cut and shard videos, and index the shards.

    Finds the videos below SOURCES, refuses those that do not decode (`OUT/rejected.jsonl` says
    which and why), and writes `OUT/shard-*.tar`, `OUT/index.npy` and `OUT/manifest.json`. The
    same command again continues where an interrupted run stopped; the result has the same bytes.

    Args:
        sources: Folders with videos, or video files; write `--` before a name like `-clip.mp4`.
        out: Folder of the dataset; made if missing.
        settings: How the videos are prepared.
        workers: Videos that are worked on at a time; the machine's cores by default.
        address: Join the Ray cluster at host:port, whose machines must all see SOURCES and OUT.
        overwrite: Replace a dataset of other sources or settings that stands in OUT.
        json: Print the result as JSON.
    """
    # Here, because webdataset brings torch, which no other verb of this file needs.
    from data_prep.driver import Stopped, Workers  # noqa: PLC0415
    from data_prep.prepare import prepare  # noqa: PLC0415

    try:
        with shown_progress() as show:
            report = prepare(
                sources,
                out,
                settings or PrepSettings(),
                workers=Workers(num_cpus=workers, address=address),
                overwrite=overwrite,
                on_progress=show,
            )
    except KeyboardInterrupt as error:
        sys.stderr.write(f"stopped; the same command continues, {out} keeps finished shards\n")
        if isinstance(error, Stopped):
            return ExitCode.SAVED_RUN_AGAIN
        raise
    if json:
        Console().print_json(json_text.dumps(asdict(report)))
    else:
        Console().print(summary_text(report), soft_wrap=True, highlight=False, markup=False)
    return ExitCode.DONE
