"""Loss spikes: found against the steps just before, and what is left out after a rewind.

The window is part of a checkpoint, so a resumed run takes the same decisions as one that was never
stopped.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.limits import GuardsConfig
from pipeline.track.rewinds import Rewind

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


def plan_rewind(spike: Spike, commits: Sequence[int], config: GuardsConfig, stage: range) -> Rewind:
    """Where to go back to and what to leave out: the steps on either side of the spike.

    Args:
        spike: What was found.
        commits: Steps of the checkpoints there are, at least one before the spike.
        config: How many steps to leave out.
        stage: The steps of the spike's stage. None of another is left out, nor its last one, which
            is saved.
    """
    wanted = spike.step - config.spike_skip_steps
    before = [step for step in commits if step < spike.step]
    to_step = max((step for step in before if step < wanted), default=max(before))
    return Rewind(
        spike_step=spike.step,
        to_step=to_step,
        first_step=max(wanted, to_step + 1, stage[0]),
        last_step=min(spike.step + config.spike_skip_steps, stage[-1] - 1),
        reason=spike.words,
    )
