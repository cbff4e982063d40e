"""Which rule of masks learns most for the same compute? The demo's run under each rule.

Trains on clips whose classes only motion tells apart, once for every rule and seed, and probes the
frozen encoders with a linear head: untrained, in the middle and at the end. Compute is counted in
the exact FLOPs of the tokens that each rule keeps, which no other work on the machine disturbs;
seconds without the waiting for data stand beside it. Rules take turns within a seed.

    python -m benchmarks.truncate                                    # 3 rules, 2 seeds, 500 steps
    python -m benchmarks.truncate --steps 20 --seeds 1 --clips 60    # only to see that it runs
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks.commands import jepa, jepa_json, make_dataset, probe_words, say
from benchmarks.result import RESULTS, print_table, write_result
from pipeline.clip import StepReport
from pipeline.config.load import load_config
from pipeline.masks.blocks import Truncate
from pipeline.masks.kept import expected_kept
from pipeline.run import RunConfig
from pipeline.track.metrics import read_metrics

_CONFIG = Path("pipeline/configs/demo.yaml")
_RULES: tuple[Truncate, ...] = get_args(Truncate)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One encoder of a run, and what it took to get there."""

    step: int
    tflop: float
    """All steps so far, in 10^12 operations."""
    compute_seconds: float
    """All steps so far, without waiting for data."""
    top1_percent: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run under one rule."""

    rule: Truncate
    seed: int
    step_seconds: float
    """Median over all steps, without waiting for data."""
    points: tuple[Point, ...]
    """Untrained first."""

    def top1_after(self, tflop: float) -> float:
        """Top-1 after so much compute, on a line between the points around it."""
        before = [p for p in self.points if p.tflop <= tflop][-1]
        later = [p for p in self.points if p.tflop > tflop][:1]
        if not later:
            return before.top1_percent
        share = (tflop - before.tflop) / (later[0].tflop - before.tflop)
        return before.top1_percent + share * (later[0].top1_percent - before.top1_percent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, probes, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="steps of every run")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds of every rule")
    parser.add_argument("--clips", type=int, default=720, help="clips of training and of the probe")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures")
    asked = parser.parse_args(arguments)
    data = Path(f"runs/truncate-data-{asked.clips}")
    make_dataset(
        data,
        num_unlabelled=asked.clips,
        num_train=asked.clips,
        num_validation=max(24, 2 * asked.clips // 3),
    )
    runs = [
        _train(rule, seed, asked.steps, data, asked.ranks)
        for seed in range(1, asked.seeds + 1)
        for rule in _RULES
    ]
    figures = {"rules": _summary(runs), "runs": [asdict(run) for run in runs], "kept": _kept()}
    settings = {"steps": asked.steps, "seeds": asked.seeds, "ranks": asked.ranks}
    say(f"written to {write_result('truncate', figures, settings, folder=asked.out)}")
    _show(figures["rules"])
    return 0


def _train(rule: Truncate, seed: int, steps: int, data: Path, ranks: int) -> Trained:
    run = Path(f"runs/truncate-{rule}-{seed}")
    shutil.rmtree(run, ignore_errors=True)
    lengths = _stage_steps(steps)
    words = [f"stages.{number}.steps={length}" for number, length in enumerate(lengths)]
    words += [f"stages.0.learning_rate.warmup_steps={max(1, lengths[0] // 6)}"]
    words += [f"name={run.name}", f"seed={seed}", f"masks.truncate={rule}"]
    words += [f"data.sources.0.path={data}/shards", "track.mlflow.enabled=false"]
    words += [f"checkpoint.every_steps={sum(lengths) // 2}"]
    jepa(f"train {_CONFIG} {' '.join(words)} --ranks {ranks}")
    middle = sum(lengths) // 2
    found = jepa_json(f"{probe_words(run, data, f'0,{middle},last')} --head linear --seeds 1")
    return _trained(rule, seed, run, found["records"])


def _stage_steps(steps: int) -> list[int]:
    """The stages of the demo's run, scaled to so many steps together."""
    stages = load_config(_CONFIG, RunConfig).config.stages
    total = sum(stage.steps for stage in stages)
    return [max(1, round(stage.steps * steps / total)) for stage in stages]


def _trained(rule: Truncate, seed: int, run: Path, records: list[dict[str, Any]]) -> Trained:
    reports = [logged.report for logged in read_metrics(run)]
    points = tuple(
        Point(
            step=record["step"],
            tflop=round(sum(r.flops for r in reports if r.step <= record["step"]) / 1e12, 3),
            compute_seconds=round(
                sum(_compute_seconds(r) for r in reports if r.step <= record["step"]), 1
            ),
            top1_percent=round(100 * record["top1"], 1),
        )
        for record in sorted(records, key=lambda record: record["step"])
    )
    median = round(statistics.median(map(_compute_seconds, reports)), 4)
    return Trained(rule=rule, seed=seed, step_seconds=median, points=points)


def _compute_seconds(report: StepReport) -> float:
    return report.step_seconds - report.data_wait_seconds


def _summary(runs: Sequence[Trained]) -> list[dict[str, Any]]:
    """Means over seeds; equal compute is what the cheapest run took in all."""
    equal = min(run.points[-1].tflop for run in runs)
    rows = []
    for rule in _RULES:
        own = [run for run in runs if run.rule == rule]
        ends = [run.points[-1] for run in own]
        at_equal = [run.top1_after(equal) for run in own]
        gain = statistics.mean(
            run.points[-1].top1_percent - run.points[0].top1_percent for run in own
        )
        tflop = statistics.mean(end.tflop for end in ends)
        rows.append(
            {
                "rule": rule,
                "step_seconds": round(statistics.mean(run.step_seconds for run in own), 4),
                "tflop": round(tflop, 2),
                "untrained_percent": _mean([run.points[0].top1_percent for run in own]),
                "top1_percent": _mean([end.top1_percent for end in ends]),
                "least": min(end.top1_percent for end in ends),
                "greatest": max(end.top1_percent for end in ends),
                "equal_tflop": equal,
                "top1_percent_at_equal_compute": _mean(at_equal),
                "points_per_tflop": round(gain / max(tflop, 1e-9), 2),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return round(statistics.mean(values), 1)


def _kept() -> dict[str, list[dict[str, Any]]]:
    """Tokens by time that each rule keeps in the last stage's clips."""
    config = load_config(_CONFIG, RunConfig).config
    stage = config.stages[-1]
    grid = config.grid(stage.frames, stage.resolution)
    return {
        rule: [
            {name: [round(value, 1) for value in values] for name, values in asdict(mask).items()}
            for mask in expected_kept(
                config.masks_of(stage).model_copy(update={"truncate": rule}),
                grid,
                stage.micro_batch,
            )
        ]
        for rule in _RULES
    }


def _show(rows: Sequence[dict[str, Any]]) -> None:
    columns = (
        "masks.truncate", "s/step", "TFLOP", "untrained %", "top-1 %", "at equal compute %",
        "points/TFLOP",
    )  # fmt: skip
    shown = (
        "rule", "step_seconds", "tflop", "untrained_percent", "top1_percent",
        "top1_percent_at_equal_compute", "points_per_tflop",
    )  # fmt: skip
    table = [[row[name] for name in shown] for row in rows]
    print_table("Learning under each rule of masks, chance 8.3 %", columns, table)


if __name__ == "__main__":
    sys.exit(main())
