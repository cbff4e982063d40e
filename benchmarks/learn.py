"""Does it learn? The encoder against its own untrained start, by the same probe.

`make learn` trains `pipeline/configs/learn.yaml` once and probes it along the way. With `--demo`
the demo's run is trained with three seeds instead. Both write the scores to `benchmarks/results/`.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import jepa, jepa_json, make_dataset, probe_words, say
from benchmarks.result import print_table, write_result
from pipeline.track.metrics import read_metrics

_HEADS = ("attentive", "linear", "knn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, probes, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="the demo's run with three seeds")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine")
    asked = parser.parse_args(arguments)
    if asked.demo:
        _demo_seeds(asked.ranks)
    else:
        _long_run(asked.ranks)
    return 0


def _long_run(ranks: int) -> None:
    begin = time.monotonic()
    run, data = Path("runs/learn"), Path("runs/learn-data")
    shutil.rmtree(run, ignore_errors=True)
    make_dataset(data, num_unlabelled=3000, num_train=960, num_validation=480)
    jepa(f"train pipeline/configs/learn.yaml --ranks {ranks}")
    steps = "0,800,1600,2400,3200,last"
    found = jepa_json(f"{probe_words(run, data, steps)} --head linear --seeds 3")
    records = found["records"]
    ends = jepa_json(f"{probe_words(run, data, '0,last')} --seeds 3")
    records = records + [r for r in ends["records"] if r["head"] != "linear"]
    jepa(f"report {run}")
    curve = [
        {"step": s.report.step, "loss": round(s.report.loss, 4), **_rounded(s.report.health or {})}
        for s in read_metrics(run)
        if s.report.health
    ]
    seconds = round(time.monotonic() - begin)
    figures = {"seconds": seconds, "scores": _scores(records), "curve": curve[::4]}
    say(f"written to {write_result('learn', figures, {'ranks': ranks})}")
    _show("Trained longer, by steps", figures["scores"])
    say(str(run / "report.html"))


def _demo_seeds(ranks: int) -> None:
    data = Path("runs/demo-data")
    make_dataset(data, num_unlabelled=720, num_train=720, num_validation=480)
    records: list[dict[str, Any]] = []
    for seed in (1, 2, 3):
        run = Path(f"runs/demo-seed-{seed}")
        shutil.rmtree(run, ignore_errors=True)
        jepa(
            f"train pipeline/configs/demo.yaml name={run.name} seed={seed} "
            f"track.mlflow.enabled=false --ranks {ranks}"
        )
        found = jepa_json(f"{probe_words(run, data, '0,last')} --head linear --seeds 1")
        records += [{**record, "seed": seed} for record in found["records"]]
    figures = {"scores": _scores(records), "seeds": _by_seed(records)}
    say(f"written to {write_result('learn_demo', figures, {'ranks': ranks})}")
    _show("The demo's run, three seeds", figures["scores"])


def _scores(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds for each head and step, in points of top-1."""
    rows = []
    for head in _HEADS:
        for step in sorted({record["step"] for record in records}):
            top1 = [100 * r["top1"] for r in records if (r["head"], r["step"]) == (head, step)]
            if top1:
                rows.append(
                    {
                        "head": head,
                        "step": step,
                        "num_seeds": len(top1),
                        "top1_percent": round(statistics.mean(top1), 1),
                        "least": round(min(top1), 1),
                        "greatest": round(max(top1), 1),
                    }
                )
    return rows


def _by_seed(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        str(seed): {
            f"step {r['step']}": round(100 * r["top1"], 1) for r in records if r["seed"] == seed
        }
        for seed in sorted({record["seed"] for record in records})
    }


def _rounded(health: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in health.items()}


def _show(title: str, scores: list[dict[str, Any]]) -> None:
    rows = [
        (f"{s['head']} at step {s['step']}", s["top1_percent"], s["least"], s["greatest"])
        for s in scores
    ]
    print_table(title, ("12 classes, chance 8.3 %", "top-1 %", "least", "greatest"), rows)


if __name__ == "__main__":
    sys.exit(main())
