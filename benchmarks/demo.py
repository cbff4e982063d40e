"""`make demo`: the whole product once, by the commands a user would type.

Videos are rendered and prepared together with real ones (some of them broken), a three-stage run
is trained on two ranks, stopped by SIGTERM and resumed, its encoder probed beside its own untrained
start, and the report written. Every command is printed before it is run.
"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.commands import command, jepa, make_dataset, probe_words, say
from pipeline.errors import ExitCode
from pipeline.track.metrics import read_metrics

CONFIG = "pipeline/configs/demo.yaml"
RUN = Path("runs/demo")
DATA = Path("runs/demo-data")
# In the middle of the second stage: the resume goes on at another clip length than the start's.
STOP_AT_STEP = 300
_STEP_LIMIT_SECONDS = 600.0


def main() -> int:
    """Runs the demo; the last line names the report."""
    begin = time.monotonic()
    # A demo starts from nothing; the videos and shards of an earlier one are found and kept.
    shutil.rmtree(RUN, ignore_errors=True)
    make_dataset(DATA, num_unlabelled=720, num_train=720, num_validation=480)
    jepa(f"plan {CONFIG} --gpus 2")
    _train_and_stop()
    jepa(f"status {RUN}")
    jepa(f"ckpt verify {RUN}")
    jepa(f"resume {RUN}")
    jepa(f"{probe_words(RUN, DATA, '0,last')} --head linear --seeds 3")
    jepa(f"report {RUN}")
    say(f"Done in {time.monotonic() - begin:.0f} s. The report:")
    say(str(RUN / "report.html"))
    return 0


def _train_and_stop() -> None:
    """Starts training, sends SIGTERM in the middle as a scheduler would, and expects 75."""
    process = subprocess.Popen(command(f"train {CONFIG} --ranks 2"))
    step, moved = 0, time.monotonic()
    while process.poll() is None and step < STOP_AT_STEP:
        if (now := _last_step()) > step:
            step, moved = now, time.monotonic()
        if time.monotonic() > moved + _STEP_LIMIT_SECONDS:
            process.terminate()
            raise SystemExit(f"The demo's run came no further than step {step}; it was ended.")
        time.sleep(0.5)
    say(f"\n$ kill -TERM {process.pid}    # what a scheduler does before it takes the machine")
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code != ExitCode.SAVED_RUN_AGAIN:
        say(f"Expected exit code {ExitCode.SAVED_RUN_AGAIN:d} (saved, run me again), got {code}.")
        raise SystemExit(code or ExitCode.BUG)
    say(f"exit code {code}: saved, run me again")


def _last_step() -> int:
    if not (RUN / "metrics.jsonl").exists():
        return 0
    steps = read_metrics(RUN)
    return steps[-1].report.step if steps else 0


if __name__ == "__main__":
    sys.exit(main())
