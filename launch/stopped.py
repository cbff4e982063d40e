"""Whether a run that has saved and stopped is to stay so.

Slurm's batch script asks the same of the run's folder. Kubernetes knows only exit codes, and starts
again whatever did not end with 0; so there it has to be known before a pod ends.
"""

import time
from pathlib import Path

from pipeline.track.metrics import read_events

# Its own words for a stop that a person asked for, or wrote into its configuration.
FOR_GOOD = ("`jepa stop` was asked for", "the time limit is near")
_LIFE = ("start", "resume", "stop", "end", "fault")
_POLL_SECONDS = 0.5


def is_stopped_for_good(run_dir: Path, *, patience_seconds: float = 30.0) -> bool:
    """Whether the run's last word is that it was stopped on purpose.

    Args:
        run_dir: Its folder.
        patience_seconds: How long to wait for that word: the first rank says it, and ranks on other
            machines may end, or see it, a moment before or after.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        told = [event for event in read_events(run_dir) if event.name in _LIFE]
        if told and told[-1].name not in ("start", "resume"):
            words = str(told[-1].details.get("reason", ""))
            return told[-1].name == "stop" and words.startswith(FOR_GOOD)
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
