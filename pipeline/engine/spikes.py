"""Loss spikes: found against the steps just before, and the steps that a rewind leaves out.

The window and the list of steps left out are part of a checkpoint, so a resumed run takes the same
decisions as one that was never stopped.
"""

import json
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.files import write_atomically
from pipeline.limits import GuardsConfig

REWINDS_FILE = "rewinds.json"
# A standard deviation from the median distance to the median, for a normal distribution.
_NORMAL = 1.4826
# Of a loss that hardly moves, every wobble would be many deviations away.
_SMALLEST_SPREAD = 0.005
_FEWEST = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Spike:
    """A loss far above those just before it."""

    step: int
    loss: float
    median: float
    sigmas: float

    @property
    def words(self) -> str:
        """How events and messages say it."""
        return (
            f"the loss of step {self.step} is {self.loss:.4g}, {self.sigmas:.1f} deviations above "
            f"the {self.median:.4g} of the steps before"
        )


class SpikeWindow:
    """The losses that the next one is compared with; every rank has the same.

    Args:
        config: Length of the window and threshold.
        losses: Those of a checkpoint.
    """

    def __init__(self, config: GuardsConfig, losses: Sequence[float] = ()) -> None:
        self._config = config
        self._losses: deque[float] = deque(losses, maxlen=config.spike_window_steps)

    def judge(self, step: int, loss: float, *, first_of_stage: bool) -> Spike | None:
        """Takes in a finite loss and says whether it is a spike.

        Medians are not moved by a few spikes; as many as half of the window are a new level.
        """
        if first_of_stage:
            # Other clips, other masks: the losses of two stages do not compare.
            self._losses.clear()
        spike = self._spike(step, loss)
        self._losses.append(loss)
        return spike

    def losses(self) -> list[float]:
        """What a checkpoint keeps."""
        return list(self._losses)

    def _spike(self, step: int, loss: float) -> Spike | None:
        if len(self._losses) < _FEWEST:
            return None
        median = statistics.median(self._losses)
        distance = statistics.median(abs(one - median) for one in self._losses)
        spread = max(_NORMAL * distance, _SMALLEST_SPREAD * abs(median), 1e-12)
        sigmas = (loss - median) / spread
        if sigmas < self._config.spike_sigmas:
            return None
        return Spike(step=step, loss=loss, median=median, sigmas=sigmas)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewind:
    """Steps that are left out for good, and the checkpoint from which the run went on."""

    spike_step: int
    to_step: int
    first_step: int
    last_step: int
    reason: str
    is_done: bool = False
    """Whether the run has been taken up from there."""


def plan_rewind(
    spike: Spike, commits: Sequence[int], config: GuardsConfig, num_steps: int
) -> Rewind:
    """Where to go back to and what to leave out: the steps on either side of the spike.

    Args:
        spike: What was found.
        commits: Steps of the checkpoints there are, at least one before the spike.
        config: How many steps to leave out.
        num_steps: Steps of the whole run; the last is never left out, since it ends the run.
    """
    wanted = spike.step - config.spike_skip_steps
    before = [step for step in commits if step < spike.step]
    to_step = max((step for step in before if step < wanted), default=max(before))
    return Rewind(
        spike_step=spike.step,
        to_step=to_step,
        first_step=max(wanted, to_step + 1),
        last_step=min(spike.step + config.spike_skip_steps, num_steps - 1),
        reason=spike.words,
    )


def read_rewinds(run_dir: Path) -> tuple[Rewind, ...]:
    """All rewinds of a run, oldest first.

    Raises:
        CheckpointError: Their record cannot be read: which steps to leave out is not known.
    """
    path = run_dir / REWINDS_FILE
    try:
        return tuple(Rewind(**record) for record in json.loads(path.read_text()))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {error}", remedy="Restore it: it says which steps to leave out."
        ) from error


def write_rewinds(run_dir: Path, rewinds: Iterable[Rewind]) -> None:
    """Replaces the record."""
    text = json.dumps([asdict(rewind) for rewind in rewinds], indent=1)
    write_atomically(run_dir / REWINDS_FILE, text + "\n")


def pending(rewinds: Sequence[Rewind]) -> Rewind | None:
    """The rewind that the next start has to carry out."""
    return rewinds[-1] if rewinds and not rewinds[-1].is_done else None


def left_out(step: int, rewinds: Iterable[Rewind]) -> bool:
    """Whether a step is left out: its clips are not trained on, its number passes."""
    return any(rewind.first_step <= step <= rewind.last_step for rewind in rewinds)


def steps_to_take(first: int, last: int, rewinds: Sequence[Rewind]) -> Iterator[int]:
    """The steps from `first` to `last` that are not left out."""
    return (step for step in range(first, last + 1) if not left_out(step, rewinds))
