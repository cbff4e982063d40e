"""Why a run stops before its end: signals and the stop file, agreed by all ranks.

A signal reaches one rank or all of them, at different moments; each only notes it. Ranks agree in
the one collective that every step has anyway, so that all save at the same step.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from pipeline.track.folder import STOP_FILE

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopReason(IntEnum):
    """In order of precedence: of several reasons the highest is given."""

    NONE = 0
    STOP_FILE = 1
    SIGUSR1 = 2
    SIGINT = 3
    SIGTERM = 4

    @property
    def words(self) -> str:
        """How logs and `jepa status` say it."""
        if self is StopReason.STOP_FILE:
            return "`jepa stop` was asked for"
        return f"{self.name} was received"


class StopWatch:
    """Notes what asks this rank to stop.

    Args:
        run_dir: Folder of the run; only rank 0 looks for the stop file.
        is_main: Whether this is rank 0.
    """

    def __init__(self, run_dir: Path, *, is_main: bool) -> None:
        self._file = run_dir / STOP_FILE
        self._is_main = is_main
        self._noted = StopReason.NONE

    @property
    def noted(self) -> StopReason:
        """What this rank has been asked so far; others may not know it yet."""
        if self._noted is StopReason.NONE and self._is_main and self._file.exists():
            self._noted = StopReason.STOP_FILE
        return self._noted

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
        self._noted = max(self._noted, StopReason[signal.Signals(number).name])
