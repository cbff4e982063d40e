"""What a person sees of a preparation: progress while it runs, a summary at its end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from data_prep.prepare import PrepProgress, PrepReport


@contextmanager
def shown_progress() -> Iterator[Callable[["PrepProgress"], None]]:
    """A progress bar on standard error: videos done, rate, remaining time, what was refused."""
    progress = Progress(
        TextColumn("preparing videos"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rejected]}"),
        console=Console(stderr=True),
    )
    task = progress.add_task("videos", total=None, rejected="")

    def show(now: "PrepProgress") -> None:
        # Started here, so that an error about the arguments stands alone.
        progress.start()
        progress.update(
            task, completed=now.done, total=now.total, rejected=_rejected_text(now.rejected)
        )

    try:
        yield show
    finally:
        progress.stop()


def summary_text(report: "PrepReport") -> str:
    """The result in a few lines."""
    lines = [
        f"{report.dataset}: {report.num_samples} samples, {report.hours:.3f} hours in "
        f"{report.num_shards} shards of {report.shard_bytes / 2**20:.1f} MiB together",
        f"sources: {report.num_sources} videos of {report.source_bytes / 2**20:.1f} MiB"
        + (f"; {report.num_ignored} other files ignored" if report.num_ignored else ""),
        f"digest: {report.digest}",
    ]
    if report.num_kept_shards:
        lines.append(f"{report.num_kept_shards} shards were already there")
    if report.rejected:
        lines.append(f"{_rejected_text(report.rejected)}; {report.dataset}/rejected.jsonl")
    return "\n".join(lines)


def _rejected_text(rejected: dict[str, int]) -> str:
    if not rejected:
        return ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    return f"{sum(rejected.values())} refused or partial: {reasons}"


class _Rate(ProgressColumn):
    """Videos per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")
