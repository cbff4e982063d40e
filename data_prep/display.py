"""What a person sees of a preparation: progress while it runs, a summary at its end."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from data_prep.estimate import Estimate
    from data_prep.prepare import PrepProgress, PrepReport, Watch

_STAGES = {
    "listing": "listing sources",
    "sources": "preparing sources",
    "shards": "packing shards",
    "sample": "preparing a sample",
}


@contextmanager
def shown_progress() -> Iterator["Watch"]:
    """A bar for each stage on standard error: done, rate, time left, what was refused and why."""
    # Here, because it brings everything that a preparation needs.
    from data_prep.prepare import Watch  # noqa: PLC0415

    progress = _Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    tasks: dict[str, TaskID] = {}

    def show(now: "PrepProgress") -> None:
        # Started here, so that an error about the arguments stands alone.
        progress.start()
        if now.stage not in tasks:
            for task in tasks.values():
                progress.update(task, total=progress.tasks[task].completed)
                progress.stop_task(task)
            tasks[now.stage] = progress.add_task(_STAGES[now.stage], total=None, completed=now.done)
        progress.left_out = _rejected_text(now.rejected)
        progress.update(tasks[now.stage], completed=now.done, total=now.total)

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    try:
        yield Watch(progress=show, say=say)
    finally:
        progress.stop()


def summary_text(report: "PrepReport") -> str:
    """The result in a few lines."""
    lines = [
        f"{report.dataset}: {report.num_samples} samples, {report.hours:.3f} hours in "
        f"{report.num_shards} shards of {report.shard_bytes / 2**20:.1f} MiB together",
        f"sources: {report.num_sources} of {report.source_bytes / 2**20:.1f} MiB, "
        f"{report.num_prepared} of them prepared by this run"
        + (f"; {_others_text(report.num_others)}" if report.num_others else ""),
        f"digest: {report.digest}",
    ]
    if not (report.num_prepared or report.num_new_shards):
        lines.insert(0, "nothing to do: the dataset has all of these sources already")
    elif report.num_new_shards < report.num_shards:
        kept = report.num_shards - report.num_new_shards
        lines.append(f"shards: {report.num_new_shards} written, {kept} were there and stayed")
    if report.rejected or report.num_others:
        text = _rejected_text(report.rejected)
        lines.append(
            f"{text + '; ' if text else ''}{report.dataset}/rejected.jsonl names every one"
        )
    return "\n".join(lines)


def estimate_text(estimate: "Estimate") -> str:
    """What a preparation would come to, in a few lines."""
    lines = [
        f"{estimate.num_sources} sources of {estimate.source_bytes / 2**20:.1f} MiB, "
        f"{estimate.num_known} of them done already; {_others_text(estimate.num_others)}",
        f"from {estimate.num_sampled} of them, which took {estimate.sample_seconds:.1f} s of work:",
        f"  hours of video in shards   {estimate.hours:.3f}",
        f"  size of the shards         {estimate.shard_bytes / 2**20:.1f} MiB",
        f"  samples                    {estimate.num_samples}",
        f"  time                       {_time_text(estimate.seconds)} with {estimate.num_workers} "
        "workers",
    ]
    if estimate.rejected:
        lines.append(f"  in the sample              {_rejected_text(estimate.rejected)}")
    lines.append("nothing was written")
    return "\n".join(lines)


def _others_text(number: int) -> str:
    return f"{number} other files are missing or no videos"


def _time_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 2 else f"{seconds:.0f} s"


def _rejected_text(rejected: dict[str, int]) -> str:
    if not rejected:
        return ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    return f"{sum(rejected.values())} left out: {reasons}"


class _Bars(Progress):
    """Bars with a line below them that says what was left out, for which no bar has room."""

    left_out = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars and the line."""
        yield from super().get_renderables()
        if self.left_out:
            yield Text(self.left_out)


class _Rate(ProgressColumn):
    """Sources or shards per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")
