"""A long run without faults: whether memory, open files, threads and shared memory stay flat."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from pipeline.errors import ExitCode
from tests.faults.harness import Run, finish
from tests.shards import write_dataset

_SAMPLE_SECONDS = 1.0
# Caches, the allocator and the first saves settle within the first part.
_WARM_UP = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakReport:
    """Growth after the warm-up."""

    steps: int
    exit_code: int
    mib_per_1000_steps: float
    """Slope of the trainer's resident memory."""
    files_growth: int
    threads_growth: int
    shared_memory_growth: int
    """Names in /dev/shm at the end, compared with the warm-up's end."""
    seconds: float


def run(steps: int, folder: Path) -> SoakReport:
    """Trains so many steps and samples the training process meanwhile."""
    write_dataset(folder / "data", 24)
    run_ = Run(folder, "soak", steps=steps, checkpoint={"every_steps": 50, "keep_last": 2})
    begin = time.monotonic()
    process = run_.start()
    samples = []
    # Its pipe holds 64 KiB; a line every ten steps stays below that for some thousand steps.
    while process.poll() is None:
        sample = _sample(psutil.Process(process.pid), run_)
        samples += [sample] if sample else []
        time.sleep(_SAMPLE_SECONDS)
    outcome = finish(process)
    # Not the end, when everything is let go.
    late = [sample for sample in samples if _WARM_UP * steps <= sample[0] < steps]
    late = np.array(late, dtype=np.float64).reshape(-1, 5)
    growth = late[-1] - late[0] if len(late) > 1 else np.full(5, np.nan)
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) if len(late) > 2 else float("nan")
    return SoakReport(
        steps=max(run_.steps()) if outcome.code == ExitCode.DONE else 0,
        exit_code=outcome.code,
        mib_per_1000_steps=round(1000 * slope, 3),
        files_growth=int(np.nan_to_num(growth[2], nan=-1)),
        threads_growth=int(np.nan_to_num(growth[3], nan=-1)),
        shared_memory_growth=int(np.nan_to_num(growth[4], nan=-1)),
        seconds=round(time.monotonic() - begin, 1),
    )


def _sample(process: psutil.Process, run: Run) -> tuple[int, float, int, int, int] | None:
    """Step, resident MiB, open files, threads and names in shared memory."""
    metrics = run.path / "metrics.jsonl"
    try:
        step = sum(1 for _ in metrics.open("rb"))
        mib = process.memory_info().rss / 2**20
        return step, mib, process.num_fds(), process.num_threads(), _num_shared()
    except (OSError, psutil.Error):
        return None


def _num_shared() -> int:
    folder = Path("/dev/shm")  # noqa: S108 - the kernel's own name for it
    return len(list(folder.iterdir())) if folder.is_dir() else 0
