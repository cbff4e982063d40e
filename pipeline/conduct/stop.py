"""What asks the conductor to stop: signals, noted and obeyed between two jobs' ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopSignals:
    """Notes the first signal; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self._noted = threading.Event()
        self.name: str | None = None
        """Of the signal that came."""

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._noted.is_set()

    def wait(self, seconds: float) -> None:
        """Waits so long, or until a signal comes."""
        self._noted.wait(seconds)

    def listen(self) -> None:
        """Takes the signals; once more after a library has taken them for itself."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals for the time being, and gives them back."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.is_set:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name
        self._noted.set()
