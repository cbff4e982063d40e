"""Why a run stops before its end: signals, the stop file, time limits; agreed by all ranks.

A signal reaches one rank or all of them, at different moments; each only notes it. Ranks agree in
the one collective that every step has anyway, so that all save at the same step.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from pipeline.limits import StopConfig
from pipeline.track.folder import STOP_FILE

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopReason(IntEnum):
    """In order of precedence: of several reasons the highest is given."""

    NONE = 0
    STOP_FILE = 1
    TIME_LIMIT = 2
    SIGUSR1 = 3
    SIGUSR2 = 4
    SIGINT = 5
    SIGTERM = 6

    @property
    def words(self) -> str:
        """How logs and `jepa status` say it."""
        if self is StopReason.STOP_FILE:
            return "`jepa stop` was asked for"
        if self is StopReason.TIME_LIMIT:
            return "the time limit is near"
        return f"{self.name} was received"


class StopWatch:
    """Notes what asks this rank to stop, and how long it may still live.

    Args:
        run_dir: Folder of the run; only rank 0 looks for the stop file and at the clock.
        is_main: Whether this is rank 0.
        config: Time limits and grace.
        job_end: When the job is killed, unix seconds, if the scheduler says.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        is_main: bool,
        config: StopConfig | None = None,
        job_end: float | None = None,
    ) -> None:
        config = config or StopConfig()
        self._file = run_dir / STOP_FILE
        self._is_main = is_main
        self._noted = StopReason.NONE
        self._grace = math.inf if config.grace_seconds is None else config.grace_seconds
        self._kill_at = math.inf
        """On the monotonic clock, from the first signal on."""
        hours = None if config.max_hours is None else time.time() + 3600 * config.max_hours
        limits = [limit for limit in (config.at_unix, hours, job_end) if limit is not None]
        # Deadlines are kept on the monotonic clock: the wall clock may be set meanwhile.
        clock = time.monotonic() - time.time()
        self._end = min(limits, default=math.inf) + clock
        # Nobody kills a run for a limit of its own: it may be late.
        self._job_end = math.inf if job_end is None else job_end + clock
        self._need = self._margin = config.margin_seconds

    @property
    def noted(self) -> StopReason:
        """What this rank has been asked so far; others may not know it yet."""
        if self._noted is StopReason.NONE and self._is_main:
            if time.monotonic() + self._need >= self._end:
                self._noted = StopReason.TIME_LIMIT
            elif self._file.exists():
                self._noted = StopReason.STOP_FILE
        return self._noted

    @property
    def seconds_left(self) -> float:
        """Until this process is killed, as far as is known; infinite if nothing is."""
        return min(self._kill_at, self._job_end) - time.monotonic()

    def expect(self, *, step_seconds: float, save_seconds: float) -> None:
        """Tells how long before a time limit the run has to begin its last save."""
        self._need = self._margin + 2 * step_seconds + save_seconds

    def clear(self) -> None:
        """Removes the stop file: a resumed run has obeyed it already."""
        if self._is_main:
            self._file.unlink(missing_ok=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while the run lasts, and gives them back afterwards."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self._noted is StopReason.SIGINT:
            # Asked twice at a keyboard: whoever sits there does not want to wait for a save.
            raise KeyboardInterrupt
        if number == signal.SIGINT and self._is_main:
            # print could be interrupted in its own buffer: a handler writes straight to the file.
            os.write(2, b"\nstopping after this step, saved; Ctrl-C again ends at once, unsaved\n")
        # A person at the keyboard kills nobody; whoever sends another signal gives so much time,
        # counted from the first one: those that follow are reminders.
        if number != signal.SIGINT and math.isinf(self._kill_at):
            self._kill_at = time.monotonic() + self._grace
        self._noted = max(self._noted, StopReason[signal.Signals(number).name])
