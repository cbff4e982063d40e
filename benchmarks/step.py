"""Our step beside a straightforward one of the same formulas, on the same clips and masks.

Rounds of both sides take turns, so that whatever else the machine does disturbs both alike. The
losses of every step must agree: only then do the two compute the same thing.

    python -m benchmarks.step [--shape tiny|base] [--rounds N] [--zero STAGE]
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.reference_step import ReferenceStep
from benchmarks.result import print_table, spread, write_result
from benchmarks.shapes import SHAPES, shape_config
from pipeline.bench.batches import noise_batches
from pipeline.bench.step import OwnStep, initial_weights, measuring
from pipeline.clip import ClipBatch

_NUM_BATCHES = 4
_WARM_UP = 2
# Sums in another order; the difference grows with every step.
_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def main() -> int:
    """Measures, prints a table and writes benchmarks/results/step.json."""
    arguments = _arguments()
    figures: dict[str, Any] = {}
    with measuring() as device:
        for name in arguments.shape or SHAPES:
            figures[name] = _compare(name, device, arguments)
    rows = [
        (name, f["reference_ms"]["median"], f["ours_ms"]["median"], f["ratio"]["median"])
        for name, f in figures.items()
    ]
    print_table("A step, ms", ("shape", "straightforward", "ours", "ratio"), rows)
    if not arguments.dry:
        print(write_result("step", figures, vars(arguments)))
    return 0


def _compare(name: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    config = shape_config(name, zero_stage=arguments.zero, device=device)
    batches = noise_batches(config, 0, device, _NUM_BATCHES)
    ours = OwnStep(config, device)
    reference = ReferenceStep(config, initial_weights(ours), device)
    momentum = getattr(config.objective, "momentum").start  # noqa: B009
    times: dict[str, list[float]] = {"reference": [], "ours": []}
    worst = 0.0
    for number in range(_WARM_UP + arguments.rounds):
        batch = batches[number % _NUM_BATCHES]
        own = ours.take(batch)
        begin = time.perf_counter()
        loss = reference.take(batch, number + 1, momentum)
        times["reference"].append(time.perf_counter() - begin)
        times["ours"].append(own.gradient_seconds + own.update_seconds)
        worst = max(worst, abs(own.loss - loss) / loss)
    if not worst <= _TOLERANCE[config.precision] or not math.isfinite(worst):
        raise SystemExit(f"{name}: the losses differ by {worst:.1e}, so the steps do too")
    return _figures({side: t[_WARM_UP:] for side, t in times.items()}, batches, worst)


def _figures(
    times: dict[str, list[float]], batches: Sequence[ClipBatch], worst: float
) -> dict[str, Any]:
    ratios = [r / o for r, o in zip(times["reference"], times["ours"], strict=True)]
    clips = len(batches[0].keys)
    return {
        "reference_ms": spread([1e3 * t for t in times["reference"]], 1),
        "ours_ms": spread([1e3 * t for t in times["ours"]], 1),
        "ratio": spread(ratios, 3),
        "ours_clips_per_second": round(clips / statistics.median(times["ours"]), 2),
        "clips": clips,
        "tokens_per_clip": batches[0].grid.num_tokens,
        "largest_relative_difference_of_losses": worst,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: all")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2), help="our ZeRO stage")
    parser.add_argument("--dry", action="store_true", help="print only, write no result")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
