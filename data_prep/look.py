"""The verbs of `jepa prep` that look at a dataset: lint and stats."""

import json as json_text
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.errors import DataError, ExitCode, StorageError, UsageError

# A list that fills screens is read by nobody; --json has all of it.
_MAX_SHOWN = 50


def lint(dataset: Path, *, every: int = 100, workers: int = 1, json: bool = False) -> ExitCode:
    """Check a dataset: digests, tar structure, index against tars, and that clips decode.

    Ends with exit code 65 if anything is not as the manifest says.

    Args:
        dataset: Folder with shards, index.npy and manifest.json.
        every: Decode every N-th clip from end to end; 1 decodes all of them.
        workers: Processes that share the shards.
        json: Print the result as JSON.
    """
    from data_prep import lint as checks  # noqa: PLC0415 - brings FFmpeg and torch

    if every < 1 or workers < 1:
        raise UsageError(f"--every and --workers must be at least 1, got {every} and {workers}.")
    with _bar("checking shards") as show:
        report = checks.lint(dataset, every=every, workers=workers, on_progress=show)
    if json:
        Console().print_json(json_text.dumps(asdict(report)))
        return ExitCode.DATA if report.findings else ExitCode.DONE
    for finding in report.findings[:_MAX_SHOWN]:
        _print(f"{finding.where}: {finding.what}")
    if len(report.findings) > _MAX_SHOWN:
        _print(f"… and {len(report.findings) - _MAX_SHOWN} more; --json lists all")
    if report.findings:
        raise DataError(
            f"{dataset}: {len(report.findings)} findings in {report.num_shards} shards.",
            remedy="Remove the shards named above and run the same `jepa prep run` again.",
        )
    _print(
        f"{dataset}: {report.num_samples} samples in {report.num_shards} shards are as the "
        f"manifest says; {report.num_decoded} clips decoded from end to end"
    )
    return ExitCode.DONE


def stats(dataset: Path, *, out: Path | None = None, json: bool = False) -> None:
    """Count a dataset and draw its histograms.

    Args:
        dataset: Folder with shards, index.npy and manifest.json.
        out: The picture; DATASET/stats.png by default.
        json: Print the figures as JSON.
    """
    from data_prep.stats import dataset_stats, draw  # noqa: PLC0415 - brings matplotlib

    found = dataset_stats(dataset)
    picture = out or dataset / "stats.png"
    try:
        draw(found, picture)
    except OSError as error:
        raise StorageError(f"{picture}: cannot be written: {error.strerror or error}") from error
    if json:
        Console().print_json(json_text.dumps({**asdict(found), "picture": str(picture)}))
        return
    _print(
        f"{dataset}: {found.num_samples} samples, {found.hours:.3f} hours, {found.num_frames} "
        f"frames, {found.video_bytes / 2**20:.1f} MiB of video in {found.num_shards} shards"
    )
    for histogram in found.histograms:
        _print(
            f"  {histogram.name}: {histogram.smallest:g} to {histogram.largest:g} "
            f"{histogram.unit}, median {histogram.median:g}"
        )
    _print(f"look at {picture}")


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    with Progress(
        TextColumn(text),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("shards", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)
