"""Whether a long run grows: memory, open files, threads, shared memory and left-over files.

A real run of small steps that saves often, watched from outside by its process.

    python -m benchmarks.soak [--steps 3000] [--dry]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.commands import jepa
from benchmarks.result import print_table, write_result
from pipeline.checkpoint.layout import list_commits, list_partials
from pipeline.errors import ExitCode
from pipeline.track.metrics import read_metrics

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only listed
_EVERY_SECONDS = 1.0
# Buffers, caches and the allocator find their size first.
_WARM_UP_SHARE = 0.3
_GOAL_MIB_PER_1000_STEPS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    step: int
    rss_mib: float
    open_files: int
    threads: int
    shared_memory_files: int


def main() -> int:
    """Runs, watches and writes benchmarks/results/soak.json."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jepa(
            f"prep synthetic {folder}/videos --videos 24 --validation 0 --test 0 --seed 1 "
            "--size 64 --difficulty 0"
        )
        jepa(f"prep run {folder}/videos/videos --out {folder}/shards --short-side 64")
        samples = _watch(_start(folder, arguments), folder / "soak")
        figures = _figures(samples, folder / "soak")
    rows = [(key, json.dumps(value)) for key, value in figures.items()]
    print_table(f"{arguments.steps} steps", ("", "figure"), rows)
    if not arguments.dry:
        print(write_result("soak", figures, vars(arguments)))
    return 0


def _start(folder: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    rate = {"shape": "constant", "peak": 1e-4}
    shape = {"frames": 4, "fps": 4.0, "resolution": 64, "micro_batch": 2}
    stage = {**shape, "name": "soak", "steps": arguments.steps, "learning_rate": rate}
    changes = [
        "name=soak",
        f"runs_folder={folder}",
        f"stages={json.dumps([stage])}",
        "global_batch=2",
        "objective.encoder.depth=1",
        "objective.predictor.depth=1",
        f"data.sources={json.dumps([{'path': str(folder / 'shards')}])}",
        f"checkpoint.every_steps={arguments.save_every}",
        "track.mlflow.enabled=false",
    ]
    command = [sys.executable, "-m", "pipeline.cli", "train", "pipeline/configs/tiny-cpu.yaml"]
    return subprocess.Popen([*command, *changes], stdout=subprocess.DEVNULL)


def _watch(run: subprocess.Popen, run_dir: Path) -> list[_Sample]:
    process, samples = psutil.Process(run.pid), []
    metrics = run_dir / "metrics.jsonl"
    while run.poll() is None:
        time.sleep(_EVERY_SECONDS)
        if not metrics.exists() or process.status() == psutil.STATUS_ZOMBIE:
            continue  # not begun, or just ended
        with metrics.open("rb") as file:
            step = sum(1 for _ in file)
        try:
            with process.oneshot():
                samples.append(
                    _Sample(
                        step=step,
                        rss_mib=process.memory_info().rss / 2**20,
                        open_files=process.num_fds(),
                        threads=process.num_threads(),
                        shared_memory_files=len(list(_SHARED_MEMORY.iterdir())),
                    )
                )
        except psutil.Error:
            break  # it has just ended
    if run.wait() != ExitCode.DONE:
        raise SystemExit(f"the run ended with exit code {run.returncode}")
    return samples


def _figures(samples: list[_Sample], run_dir: Path) -> dict[str, Any]:
    last = samples[-1].step
    kept = [sample for sample in samples if sample.step >= _WARM_UP_SHARE * last]
    slope = statistics.linear_regression([s.step for s in kept], [s.rss_mib for s in kept]).slope
    steps = read_metrics(run_dir)
    names = [path.name for path in run_dir.rglob("*") if path.is_file()]
    return {
        "steps": len(steps),
        "seconds": round(steps[-1].time - steps[0].time, 1),
        "rss_mib_per_1000_steps": round(1000 * slope, 3),
        "goal_mib_per_1000_steps": _GOAL_MIB_PER_1000_STEPS,
        "after_warm_up": asdict(kept[0]),
        "at_the_end": asdict(kept[-1]),
        "checkpoints": len(list_commits(run_dir)),
        "partial_saves": len(list_partials(run_dir)),
        "temporary_files": len([name for name in names if name.endswith(".partial")]),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--save-every", type=int, default=25)
    parser.add_argument("--dry", action="store_true", help="print only, write no result")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
