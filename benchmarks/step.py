"""Our step beside a straightforward one of the same formulas, on the same clips and masks.

Rounds of all sides take turns, so that whatever else the machine does disturbs them alike. The
losses of every step must agree: only then do they compute the same thing. On a machine with a GPU
the shapes are those that V-JEPA 2 was trained with, in bf16.

    python -m benchmarks.step [--shape NAME] [--rounds N] [--zero STAGE]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.reference_step import ReferenceStep
from benchmarks.result import print_table, spread, write_result
from benchmarks.shapes import shape_config, shapes
from pipeline.bench.batches import noise_batches
from pipeline.bench.step import OwnStep, initial_weights, measuring
from pipeline.clip import ClipBatch
from pipeline.run import RunConfig

NUM_BATCHES = 4
# Every batch once: masks keep different numbers of tokens, and the first of each size compiles.
_WARM_UP = NUM_BATCHES
# Sums in another order; the difference grows with every step.
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}

Side = Callable[[ClipBatch, int], float]


def main() -> int:
    """Measures, prints a table and writes benchmarks/results/step.json."""
    arguments = _arguments()
    figures: dict[str, Any] = {}
    with measuring() as device:
        for name in arguments.shape or shapes(device):
            figures[name] = _compare(name, device, arguments)
    rows = [
        (
            name,
            f["straightforward_ms"]["median"],
            f["ours_eager_ms"]["median"],
            f["ours_ms"]["median"],
            f["ratio_eager"]["median"],
            f["ratio"]["median"],
        )
        for name, f in figures.items()
    ]
    columns = ("shape", "straightforward", "eager", "compiled", "ratio eager", "ratio")
    print_table("A step, ms", columns, rows)
    if not arguments.dry:
        print(write_result("step", figures, vars(arguments)))
    return 0


def run_rounds(
    sides: Mapping[str, Side], batches: Sequence[ClipBatch], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of every side's steps, the sides taking turns, without the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(_WARM_UP + rounds):
        for name, take in sides.items():
            begin = time.perf_counter()
            losses[name].append(take(batches[number % len(batches)], number + 1))
            seconds[name].append(time.perf_counter() - begin)
    return {name: taken[_WARM_UP:] for name, taken in seconds.items()}, losses


def own_side(config: RunConfig, device: torch.device) -> Side:
    """Our step; its loss is read at its end, as that of the others is."""
    step = OwnStep(config, device)
    return lambda batch, number: step.take(batch).loss  # noqa: ARG005


def largest_difference(losses: Mapping[str, Sequence[float]], of: str) -> float:
    """Largest relative difference of any side's loss from those of side `of`, in any step."""
    return max(
        abs(loss - wanted) / abs(wanted)
        for found in losses.values()
        for loss, wanted in zip(found, losses[of], strict=True)
    )


def ratios(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> list[float]:
    """How many times longer side `of` took than side `to`, round by round."""
    return [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]


def _compare(name: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    changes = {"zero": {"stage": arguments.zero}, "compile": not arguments.eager}
    config = shape_config(name, device, **changes)
    batches = noise_batches(config, 0, device, NUM_BATCHES)
    reference = ReferenceStep(config, initial_weights(config), device)
    momentum = getattr(config.objective, "momentum").start  # noqa: B009
    sides: dict[str, Side] = {
        "straightforward": lambda batch, number: reference.take(batch, number, momentum),
        "ours_eager": own_side(config.model_copy(update={"compile": False}), device),
        "ours": own_side(config, device),
    }
    seconds, losses = run_rounds(sides, batches, arguments.rounds)
    worst = largest_difference(losses, "straightforward")
    if not worst <= _TOLERANCE[config.precision]:
        raise SystemExit(f"{name}: the losses differ by {worst:.1e}, so the steps do too")
    clips = len(batches[0].keys)
    return {
        **{f"{side}_ms": spread([1e3 * s for s in taken], 1) for side, taken in seconds.items()},
        "ratio": spread(ratios(seconds, "straightforward", "ours"), 3),
        "ratio_eager": spread(ratios(seconds, "straightforward", "ours_eager"), 3),
        "ours_clips_per_second": round(clips / statistics.median(seconds["ours"]), 2),
        "clips": clips,
        "tokens_per_clip": batches[0].grid.num_tokens,
        "largest_relative_difference_of_losses": worst,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", help="default: all of this device")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--zero", type=int, default=2, choices=(0, 1, 2, 3), help="our ZeRO stage")
    parser.add_argument("--eager", action="store_true", help="do not compile our side")
    parser.add_argument("--dry", action="store_true", help="print only, write no result")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
