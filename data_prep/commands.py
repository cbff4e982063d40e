"""The verbs of `jepa prep`."""

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.synthetic.dataset import SyntheticConfig, write_dataset


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
