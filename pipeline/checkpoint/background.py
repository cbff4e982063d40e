"""One piece of work at a time behind the training."""

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from pipeline.errors import JepaError

_T = TypeVar("_T")
# Hashing and writing give way to the training where both want the same core.
_NICENESS = 10


class Background(Generic[_T]):
    """Runs one job in a thread that does not keep the process alive: a kill is always survived."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._result: _T | None = None
        self._refusal: JepaError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], _T]) -> None:
        """Runs a job beside the caller; there must be none running."""
        if self.is_busy:
            raise RuntimeError("the former job has not ended")
        self._result = self._refusal = None
        self._thread = threading.Thread(target=self._run, args=(job,), name="save", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until the job has ended, or so long; tells whether it has."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.is_busy

    def result(self) -> _T | None:
        """What the job gave; None while it runs and if there was none.

        Raises:
            JepaError: The job raised it.
            RuntimeError: The job ended by a fault of its own, which was printed when it happened.
        """
        if self._thread is None or self.is_busy:
            return None
        if self._refusal is not None:
            raise self._refusal
        if self._result is None:
            raise RuntimeError("the thread that saves checkpoints broke off; its error is above")
        return self._result

    def _run(self, job: Callable[[], _T]) -> None:
        # On Linux a thread has a priority of its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self._result = job()
        except JepaError as error:
            self._refusal = error
