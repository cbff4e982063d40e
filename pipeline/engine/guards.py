"""What a run tolerates, counts and finally refuses: bad samples and steps that were left out."""

from pipeline.engine.build import Parts
from pipeline.engine.rundir import record_faults
from pipeline.engine.step import StepResult
from pipeline.errors import NumericsError

# One odd batch is skipped and counted; this many in a row are a run that no longer learns.
_MAX_SKIPPED_STEPS = 10


class Guards:
    """Keeps count of what went wrong; every rank has one, and all count the same.

    Attributes:
        num_faults: Bad samples of the whole run, all ranks and attempts together.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.num_faults = parts.faults_before
        self._num_skipped = 0

    def watch(self, result: StepResult) -> None:
        """Records a step's bad samples and whether its update was left out.

        Raises:
            NumericsError: The gradient was not finite too many steps in a row.
        """
        report = result.report
        if report.num_faults:
            self.num_faults += report.num_faults
            record_faults(self._parts.run_dir, result.faults)
        if not report.skipped:
            self._num_skipped = 0
            return
        self._num_skipped += 1
        self._parts.tracker.event("skip", step=report.step, reason="the gradient was not finite")
        if self._num_skipped >= _MAX_SKIPPED_STEPS:
            raise NumericsError(f"The gradient was not finite {self._num_skipped} steps in a row.")
