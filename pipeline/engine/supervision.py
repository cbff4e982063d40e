"""What looks after a rank while it trains: signals, heartbeat, ownership and its last word."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.engine.hang import Watchdog
from pipeline.engine.last_words import LastWords
from pipeline.engine.rundir import Start
from pipeline.engine.stop import StopReason, StopWatch
from pipeline.environment import Launch, job_end
from pipeline.run import RunConfig
from pipeline.track.lease import Ownership


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """One of each per rank, from the process's first moment to its last."""

    stop: StopWatch
    watchdog: Watchdog
    ownership: Ownership
    last_words: LastWords

    def attach(self, config: RunConfig, start: Start) -> None:
        """From here on the run's folder is this job's to write to."""
        self.watchdog.attach(config.run_dir, start.attempt)
        self.last_words.attach(config.run_dir, start.attempt)


@contextmanager
def supervised(config: RunConfig, launch: Launch) -> Iterator[Supervision]:
    """Begins to look after this rank, and ends it in good order whatever happens."""
    is_main = launch.rank == 0
    stop = StopWatch(config.run_dir, is_main=is_main, config=config.stop, job_end=job_end())
    watchdog = Watchdog(
        rank=launch.rank,
        world_size=launch.world_size,
        config=config.guards,
        is_stopping=lambda: stop.noted is not StopReason.NONE,
    )
    ownership = Ownership()
    # From the first moment: a signal during start-up is obeyed before the first step.
    with stop.listening():
        watchdog.start()
        try:
            yield Supervision(
                stop=stop,
                watchdog=watchdog,
                ownership=ownership,
                last_words=LastWords(launch, watchdog),
            )
        finally:
            watchdog.stop()
            ownership.release()
