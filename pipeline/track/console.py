"""What a person sees while a run goes: a progress bar, or plain lines without a terminal."""

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pipeline.track.metrics import Event, LoggedStep, StageCost, TrackConfig
from pipeline.track.rates import WINDOW_STEPS, eta_seconds, window_rates

# Redrawing by hand, at most this often, needs no thread: one would be in the way of forked workers.
_REDRAW_SECONDS = 0.25
_QUIET_EVENTS = frozenset({"stage", "save_begun"})


class _RunConsole(Console):
    """Leaves it to the sink what a closed pipe means: rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - what rich has caught


class ConsoleSink:
    """Shows steps and events; a terminal that is gone or a full disk below it ends only the show.

    Args:
        config: How often a plain line is written.
        plan: All stages of the run, for the length of the bar and the time left.
        console: Where to; standard output by default.
        world_size: GPUs that share the global batch.
    """

    def __init__(
        self,
        config: TrackConfig,
        plan: Sequence[StageCost],
        *,
        console: Console | None = None,
        world_size: int = 1,
    ) -> None:
        self._config = config
        self._plan = plan
        self._world_size = world_size
        self.console = console or _RunConsole()
        self._window: deque[LoggedStep] = deque(maxlen=WINDOW_STEPS)
        self._rank: float | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._drawn = 0.0

    def log(self, step: LoggedStep) -> None:
        """Takes in a step; draws the bar or writes a line if it is time to."""
        if self._window and step.report.step <= self._window[-1].report.step:
            self._window.clear()
        stage_began = not self._window or self._window[-1].report.stage != step.report.stage
        self._window.append(step)
        if step.report.health and "effective_rank" in step.report.health:
            self._rank = step.report.health["effective_rank"]
        if stage_began:
            self._say(self._stage_line(step))
        if self.console.is_terminal:
            with self._while_it_is_there():
                self._draw(step)
        elif self._is_due(step):
            self._say(self._line(step))

    def event(self, event: Event) -> None:
        """Writes an event as a line of its own."""
        if event.name in _QUIET_EVENTS:
            return
        where = f" at step {event.step}" if event.step is not None else ""
        told = {key: value for key, value in event.details.items() if value not in ([], None, "")}
        details = ", ".join(f"{key} {_short(value)}" for key, value in told.items())
        self._say(f"{event.name}{where}{': ' if details else ''}{details}")

    def warn(self, sentence: str) -> None:
        """Writes something that needs a person's attention, but does not stop the run."""
        with self._while_it_is_there():
            self.console.print(f"[yellow]warning:[/] {escape(sentence)}", soft_wrap=True)

    def close(self) -> None:
        """Leaves the finished bar on the screen."""
        if self._bar is not None:
            with self._while_it_is_there():
                self._bar.refresh()
                self._bar.stop()
            self._bar = None

    def _say(self, sentence: str) -> None:
        with self._while_it_is_there():
            self.console.print(sentence, markup=False, soft_wrap=True, highlight=False)

    @contextlib.contextmanager
    def _while_it_is_there(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.console.quiet = True
            # The interpreter flushes what is left at its end, and would end with another code.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())

    def _is_due(self, step: LoggedStep) -> bool:
        number = step.report.step
        return number % self._config.log_every_steps == 0 or number in (1, self._total_steps())

    def _draw(self, step: LoggedStep) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.fields[stage]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                auto_refresh=False,
            )
            total = self._total_steps()
            self._task = self._bar.add_task("", total=total, stage="", numbers="")
            self._bar.start()
        is_last = step.report.step == self._total_steps()
        if step.time - self._drawn < _REDRAW_SECONDS and not is_last:
            return
        self._drawn = step.time
        self._bar.update(
            self._task,
            completed=step.report.step,
            stage=escape(step.report.stage_name),
            numbers=escape(self._numbers(step)),
        )
        self._bar.refresh()

    def _line(self, step: LoggedStep) -> str:
        return f"{step.report.stage_name}  {self._numbers(step)}"

    def _numbers(self, step: LoggedStep) -> str:
        report = step.report
        reports = [logged.report for logged in self._window]
        stated = self._config.peak_tflops
        peak = stated if isinstance(stated, float) else None
        rates = window_rates(reports, peak_tflops=peak, world_size=self._world_size)
        total = self._total_steps()
        parts = [
            f"step {report.step}/{total}" if total else f"step {report.step}",
            f"loss {report.loss:.4f}" + (" (skipped)" if report.skipped else ""),
            f"lr {report.learning_rate:.2e}",
        ]
        if rates is not None:
            parts += [
                f"{rates.clips_per_second:.1f} clips/s",
                f"{_thousands(rates.tokens_per_second)} tokens/s",
                f"wait {rates.wait_share:.0%}",
                f"{rates.peak_memory_gib:.1f} GiB",
            ]
            if rates.mfu is not None:
                parts.append(f"MFU {rates.mfu:.1%}")
        if self._rank is not None:
            parts.append(f"rank {self._rank:.1f}")
        left = eta_seconds(tuple(self._window), self._plan)
        if left is not None:
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        return "  ".join(parts)

    def _stage_line(self, step: LoggedStep) -> str:
        report = step.report
        number = f"{report.stage + 1}/{len(self._plan)}" if self._plan else str(report.stage + 1)
        tokens = report.tokens // max(1, report.clips)
        return (
            f"stage {number}: {report.stage_name} from step {report.step}, "
            f"{report.clips} clips a step, {tokens} tokens a clip"
        )

    def _total_steps(self) -> int | None:
        return sum(stage.steps for stage in self._plan) or None


def _thousands(value: float) -> str:
    return f"{value / 1e3:.0f}k" if value >= 1e4 else f"{value:.0f}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
