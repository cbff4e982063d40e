"""When the next checkpoint is due, by steps, by the clock, or by what a save and a failure cost."""

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from pipeline.checkpoint.layout import CheckpointConfig

_HOUR = 3600.0
# Saves take at most this share of the time, and a failure loses at most an hour.
_MAX_STALL_SHARE = 0.01
_MAX_SECONDS = 3600.0
# A save has to be over when the next one begins: that one would wait.
_CLEARANCE = 1.25
_RECENT = 5


class SaveOutcome(IntEnum):
    """How far rank 0 knows the save in flight to be."""

    NONE = 0
    PUBLISHED = 1
    FAILED = 2
    NOT_STORED = 3
    """Published in the run's folder, but not in its store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveWord:
    """What rank 0 tells all ranks about checkpoints in every step's agreement."""

    is_due: bool = False
    """By the clock."""
    outcome: SaveOutcome = SaveOutcome.NONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Time between two saves, and why it is that."""

    seconds: float
    reason: str


def derive_interval(
    stall_seconds: float, save_seconds: float, hours_between_failures: float
) -> Interval:
    """The interval that loses least: T = √(2sM), Young (1974), doi 10.1145/361147.361115.

    With s the stall of a save and M the time between failures, a share s/T of the time is stalled
    and T/(2M) is lost to failures; their sum is least there. T is bounded so that stalls take at
    most 1 % of the time, a save ends before the next begins, and a failure loses an hour at most.

    Args:
        stall_seconds: How long training stands still for a save.
        save_seconds: From the beginning of a save to its publication.
        hours_between_failures: Mean time between failures of the job.
    """
    best = math.sqrt(2.0 * stall_seconds * _HOUR * hours_between_failures)
    least = max(stall_seconds / _MAX_STALL_SHARE, _CLEARANCE * save_seconds)
    seconds = max(min(best, _MAX_SECONDS), least)
    reason = (
        f"a save stalls {stall_seconds:.3f} s and takes {save_seconds:.1f} s, one failure is "
        f"expected every {hours_between_failures:g} h: the least loss is at {best:.0f} s"
    )
    if seconds > best:
        reason += ", but saves may not run into each other nor stall more than 1 % of the time"
    elif seconds < best:
        reason += ", but no failure shall lose more than an hour"
    return Interval(seconds=seconds, reason=reason)


class SaveClock:
    """Knows when a save is due; every rank has one, rank 0's clock decides for all.

    Args:
        config: When checkpoints are written.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._clock = config, clock
        self._last = clock()
        self._stalls: deque[float] = deque(maxlen=_RECENT)
        self._saves: deque[float] = deque(maxlen=_RECENT)
        self.outcome = SaveOutcome.NONE
        """Of the save in flight; set where it is known, on rank 0."""
        self.copied = threading.Event()
        """Set when the save in flight has a copy of what it saves."""
        self.copied.set()
        self.held_up_seconds = 0.0
        """For which an update waited for that copy."""

    @property
    def interval(self) -> Interval | None:
        """Time between saves, where the clock decides; None before anything has been measured."""
        minutes = self._config.every_minutes
        if minutes is not None:
            return Interval(seconds=60.0 * minutes, reason="checkpoint.every_minutes")
        if self._config.every_steps != "auto" or not self._saves:
            return None
        return derive_interval(
            statistics.median(self._stalls),
            statistics.median(self._saves),
            self._config.hours_between_failures,
        )

    @property
    def save_seconds(self) -> float:
        """What a save takes until it is published, by the slowest of recent ones; 0 if none was."""
        return max(self._saves, default=0.0)

    def word(self) -> SaveWord:
        """What this rank says; only rank 0's word counts."""
        interval = self.interval
        is_due = interval is not None and self._clock() - self._last >= interval.seconds
        return SaveWord(is_due=is_due, outcome=self.outcome)

    def must_save(self, step: int, agreed: SaveWord) -> bool:
        """Whether all ranks save after this step, stage ends and stops aside."""
        every, keep = self._config.every_steps, self._config.keep_every_steps
        by_steps = [number for number in (every, keep) if isinstance(number, int)]
        return agreed.is_due or any(step % number == 0 for number in by_steps)

    def note_begin(self, stall_seconds: float) -> None:
        """A save has begun, for which training stood still so long."""
        self._last = self._clock()
        self._stalls.append(stall_seconds)
        self.outcome = SaveOutcome.NONE
        self.held_up_seconds = 0.0
        self.copied.clear()

    def wait_for_copy(self) -> None:
        """Returns when weights may be changed; called before every update."""
        if self.copied.is_set():
            return
        begin = self._clock()
        self.copied.wait()
        self.held_up_seconds = self._clock() - begin
        self._stalls[-1] += self.held_up_seconds

    def note_end(self, save_seconds: float, more_stall_seconds: float = 0.0) -> None:
        """A save has been published, so long after it began; training stood still for it."""
        self._saves.append(save_seconds)
        self._stalls[-1] += more_stall_seconds
