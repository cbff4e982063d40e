"""What the death of a loader worker means: start again, leave a sample out, or end the run.

A worker that is killed from outside is started again and nothing else happens. A sample that a
worker dies of, twice in a row or by using up its processor time, is left out as any bad sample
is; twice, because a first death may have been the machine's fault, and then the run must show the
very clips of an undisturbed one. Lack of memory never speaks against a sample.
"""

import signal
from collections import Counter
from collections.abc import Sequence

from pipeline.data import worker
from pipeline.data.clips import LoadClip
from pipeline.data.crew import Death
from pipeline.errors import DataError

_DEATHS_OF_A_SAMPLE = 2


class Casualties:
    """Keeps count of one rank's dead workers.

    Args:
        load_clip: Knows which sample stands at a position.

    Attributes:
        deadly: Source and number of samples that are left out from now on, and why.
    """

    def __init__(self, load_clip: LoadClip) -> None:
        self.deadly: dict[tuple[int, int], str] = {}
        self._load_clip = load_clip
        self._suspects: Counter[tuple[int, int]] = Counter()
        self._unexplained = 0

    def count(self, deaths: Sequence[Death]) -> str:
        """Takes note of some deaths.

        Returns:
            What happened, in one line.

        Raises:
            DataError: A worker gave up by itself, or too many died without a sample to blame.
        """
        for death in deaths:
            self._count(death)
        if self._unexplained > self._load_clip.config.max_worker_deaths or any(
            death.exit_code > 0 for death in deaths
        ):
            raise worker_died([(death.exit_code, self._where(death)) for death in deaths])
        return "; ".join(
            f"worker {death.worker} lost ({worker.cause_of_death(death.exit_code)}, "
            f"at {self._where(death)})"
            for death in deaths
        )

    def _count(self, death: Death) -> None:
        self._unexplained += 1
        if death.at is None or death.exit_code in worker.OUT_OF_MEMORY or death.exit_code > 0:
            return
        sample = self._load_clip.sample_at(*death.at)
        self._suspects[sample] += 1
        if death.exit_code == worker.OUT_OF_TIME:
            limit = self._load_clip.config.decode.max_seconds
            self._blame(sample, f"time: more than {limit:g} s of the processor's")
        elif self._suspects[sample] >= _DEATHS_OF_A_SAMPLE:
            self._blame(sample, f"signal {signal.Signals(-death.exit_code).name}, twice")

    def _blame(self, sample: tuple[int, int], why: str) -> None:
        self.deadly[sample] = why
        self._unexplained -= self._suspects.pop(sample)

    def _where(self, death: Death) -> str:
        return "no clip" if death.at is None else self._load_clip.describe(*death.at)


def worker_died(deaths: Sequence[tuple[int, str]]) -> DataError:
    """The error that ends a run, from exit codes and the samples that the workers were at."""
    causes = "; ".join(f"{worker.cause_of_death(code)}, at {sample}" for code, sample in deaths)
    if any(code in worker.OUT_OF_MEMORY for code, _ in deaths):
        remedy = (
            "Use fewer data.workers, a smaller data.prefetch or a larger /dev/shm (a container's "
            "default is 64 MiB), then resume."
        )
    else:
        remedy = "Resume; if it dies there again, prepare the dataset without this video."
    return DataError(f"A loader worker died: {causes}.", remedy=remedy)
