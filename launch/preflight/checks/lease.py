"""Whether another job owns the run."""

from launch.preflight.finding import Finding, Situation
from pipeline.track.lease import in_use_by

NAME = "owner"


def check_lease(situation: Situation) -> Finding:
    """The lease of the run: free, or of a job that is gone."""
    run_dir = situation.config.run_dir
    expected = "nobody else has the run"
    words = in_use_by(run_dir)
    if words is None:
        return Finding(name=NAME, state="ok", expected=expected, got="nobody")
    return Finding(
        name=NAME,
        state="fail",
        expected=expected,
        got=words,
        remedy=f"See `jepa status {run_dir}`; `jepa stop {run_dir}` ends that job.",
    )
