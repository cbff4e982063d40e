"""What a run tolerates, counts and finally refuses; all ranks decide alike, before the update.

Every rank has the same numbers (`agree`), so every rank comes to the same verdict on a step without
asking again: take it, leave it out, or go back to the checkpoint before a spike.
"""

import math
import time
from dataclasses import dataclass

from pipeline.clip import SampleFault, StepReport
from pipeline.engine.agree import Agreement
from pipeline.engine.build import Counts, Parts
from pipeline.engine.pace import PaceProbe, PaceWatch, all_hosts
from pipeline.engine.rundir import record_faults
from pipeline.engine.spikes import Spike, SpikeWindow
from pipeline.errors import DataError, NumericsError
from pipeline.stages import StagePlace
from pipeline.track.health import HealthWatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is done with a step whose gradients are there."""

    skip_reason: str | None = None
    """Why its update is left out; None takes it."""
    rewind: Spike | None = None
    """The spike that the run goes back for."""


class Guards:
    """Keeps count of what went wrong; every rank has one, and all count the same.

    Attributes:
        num_faults: Bad samples of the whole run, all ranks and attempts together.
        save_seconds: What a save takes, as the ranks agreed after the last step.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._config = parts, parts.config.guards
        self.num_faults = parts.faults_before
        self.save_seconds = 0.0
        self._num_skipped = 0
        self._num_spikes = 0
        self._spikes = SpikeWindow(self._config, parts.losses_before)
        self._paces = PaceWatch(self._config, all_hosts())
        self._probe = PaceProbe(parts.device)
        self._compute_seconds = 0.0
        self._host_begin = self._host_end = time.monotonic()
        self._health = HealthWatch()

    def own_pace(self, step: int) -> tuple[float, float]:
        """This rank's seconds for the arithmetic, and for what lay between the last two steps."""
        # Timing it waits for the device, and a machine does not change from step to step.
        if step % self._config.straggler_every_steps == 0 or not self._compute_seconds:
            self._compute_seconds = self._probe.seconds()
        return self._compute_seconds, self._host_end - self._host_begin

    def rest(self) -> None:
        """A step is done; what follows until the end of `watch` is this rank's own business."""
        self._host_begin = time.monotonic()

    def counts(self) -> Counts:
        """What a checkpoint keeps for the next start."""
        return Counts(num_faults=self.num_faults, recent_losses=tuple(self._spikes.losses()))

    def judge(self, place: StagePlace, step: int, agreed: Agreement) -> Verdict:
        """Decides on a step before its update."""
        if not math.isfinite(agreed.loss):
            more = f" and {len(agreed.not_finite) - 3} more" if len(agreed.not_finite) > 3 else ""
            return Verdict(skip_reason="; ".join(agreed.not_finite[:3]) + more)
        spike = self._spikes.judge(step, agreed.loss, first_of_stage=place.step_in_stage == 1)
        if spike is None:
            self._num_spikes = 0
            return Verdict()
        self._num_spikes += 1
        policy = self._config.on_spike
        self._parts.tracker.event("spike", step=step, reason=spike.words, policy=policy)
        if policy == "rewind":
            return Verdict(skip_reason=spike.words, rewind=spike)
        # A loss that stays up is a new level, which no skipping brings down.
        if policy == "skip" and self._num_spikes <= self._config.max_skipped_in_a_row:
            return Verdict(skip_reason=spike.words)
        return Verdict()

    def watch(
        self,
        report: StepReport,
        agreed: Agreement,
        faults: tuple[SampleFault, ...],
        why: str | None,
    ) -> None:
        """Records what was odd about a step that is done.

        Args:
            report: The step.
            agreed: What the ranks know of it.
            faults: This rank's bad samples.
            why: Why its update was left out, if it was.

        Raises:
            NumericsError: Too many steps in a row were left out.
            DataError: The run has had more bad samples than it may, all attempts together.
        """
        self.save_seconds = agreed.save_seconds
        if report.num_faults:
            self.num_faults += report.num_faults
            record_faults(self._parts.run_dir, faults)
            self._check_budget(report)
        for slow in self._paces.watch(agreed.paces, report.step_seconds):
            self._parts.tracker.event("straggler", step=report.step, reason=slow.words)
        for alarm in self._health.watch(report):
            self._parts.tracker.event("health", step=report.step, reason=alarm)
        self._count_skips(report, why or "the gradient is not finite")
        self._host_end = time.monotonic()

    def _count_skips(self, report: StepReport, why: str) -> None:
        if not report.skipped:
            self._num_skipped = 0
            return
        self._num_skipped += 1
        words = f"step {report.step} skipped on all ranks: {why}"
        self._parts.tracker.event("skip", step=report.step, reason=words)
        most = self._config.max_skipped_in_a_row
        if self._num_skipped > most:
            raise NumericsError(
                f"{self._num_skipped} steps in a row were left out, allowed are {most}; the last: "
                f"{words}. No weight was changed by them; the last checkpoint is from before."
            )

    def _check_budget(self, report: StepReport) -> None:
        """The loader's own budget starts anew with every attempt; this one is the run's."""
        config, world_size = self._parts.config.data, self._parts.launch.world_size
        num_clips = report.step * self._parts.config.global_batch
        allowed = max(config.max_bad_samples * world_size, int(config.max_bad_fraction * num_clips))
        if self.num_faults > allowed:
            raise DataError(
                f"{self.num_faults} bad samples in the {num_clips} clips of the whole run, allowed "
                f"are {allowed}.",
                remedy="Prepare the dataset again, or raise data.max_bad_fraction if it is meant.",
            )
