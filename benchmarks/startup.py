"""How long from the command to the first step, and what the time goes into."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.result import print_table, spread, write_result
from benchmarks.shards import write_real_dataset
from pipeline.track.metrics import read_events, read_metrics

_ROUNDS = 3


def main() -> int:
    """Starts a small run a few times, on one rank and on two."""
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_real_dataset(folder / "data")
        for ranks in (1, 2):
            rounds = [_start(folder, shards, ranks) for _ in range(_ROUNDS)]
            for phase in rounds[0]:
                figures[f"{phase}, {ranks} rank(s)"] = spread([r[phase] for r in rounds])
        for module in ("torch", "deepspeed", "mlflow"):
            figures[f"import {module}"] = spread([_import_seconds(module) for _ in range(_ROUNDS)])
    for phase, seconds in figures.items():
        rows.append((phase, seconds["median"], seconds["min"], seconds["max"]))
    print_table("Start-up, seconds", ("phase", "median", "min", "max"), rows)
    path = write_result("startup", figures, {"rounds": _ROUNDS, "config": "demo.yaml, 3 steps"})
    print(f"written to {path}")
    return 0


def _start(folder: Path, shards: Path, ranks: int) -> dict[str, float]:
    shutil.rmtree(folder / "start", ignore_errors=True)
    sources = json.dumps([{"path": str(shards)}])
    words = f"train pipeline/configs/demo.yaml --ranks {ranks} name=start runs_folder={folder}"
    changes = [
        *(f"stages.{number}.steps={steps}" for number, steps in enumerate((3, 1, 1))),
        "stages.0.learning_rate.warmup_steps=1",
        f"data.sources={sources}",
    ]
    begin = time.time()
    subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words.split(), *changes],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    event = next(e for e in read_events(folder / "start") if e.name == "start")
    steps = read_metrics(folder / "start")
    phases = dict(event.details["start_up_seconds"])
    first_save = next(e for e in read_events(folder / "start") if e.name == "save")
    phases["first checkpoint"] = first_save.details["seconds"]
    phases["first step"] = steps[0].report.step_seconds
    total = steps[0].time - begin
    return {
        "command to first step": total,
        **phases,
        "launcher and the rest": max(0.0, total - sum(phases.values())),
    }


def _import_seconds(module: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {module}"], check=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
