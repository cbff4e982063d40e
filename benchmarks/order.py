"""Time to find what stands at a global position, and to the first batch after a late resume.

Positions are drawn from all of 10⁹; each lookup is of another block, so none finds it dealt out.
Run: python -m benchmarks.order
"""

import argparse
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.result import print_table, spread, write_result
from benchmarks.shards import write_real_dataset
from pipeline.clip import Grid, MicroBatchPlan
from pipeline.data.loader import make_loader
from pipeline.data.order import OrderSpec, clip_ref
from pipeline.data.settings import DataConfig, Source
from pipeline.data.weights import WeightTable
from pipeline.masks.blocks import MaskConfig
from pipeline.masks.collate import collate_plan

_POSITIONS = 10**9
_SIZES = (168_000, 733_000, 1_100_000, 19_000_000, 1_000_000)
_WEIGHTS = (0.056, 0.188, 0.318, 0.188, 0.250)


def main() -> int:
    """Measure, print a table, write benchmarks/results/order.json."""
    arguments = _arguments()
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        tables = _tables(Path(scratch), arguments.weighted_samples)
        orders = {
            "uniform": OrderSpec(seed=1, sizes=_SIZES, weights=_WEIGHTS),
            "by sample weights": OrderSpec(
                seed=1, sizes=(arguments.weighted_samples,), weights=(1.0,), tables=tables
            ),
        }
        figures = {}
        for name, order in orders.items():
            for where in ("anywhere", "in a row"):
                rounds = [
                    _lookup_us(order, generator, arguments.lookups, in_a_row=where == "in a row")
                    for _ in range(arguments.rounds)
                ]
                figures[f"{name}, {where}, us"] = spread(rounds)
        dataset = write_real_dataset(Path(scratch) / "real")
        seconds = [_first_batch_seconds(dataset, workers=1) for _ in range(arguments.rounds)]
        figures["first batch at position 10^9, s"] = spread(seconds, digits=3)
    rows = [(name, *values.values()) for name, values in figures.items()]
    print_table("Order", ("", "median", "min", "max"), rows)
    print(f"written to {write_result('order', figures, vars(arguments))}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lookups", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weighted-samples", type=int, default=19_000_000)
    return parser.parse_args()


def _tables(folder: Path, num_samples: int) -> tuple[WeightTable, ...]:
    path = folder / "weights.npy"
    np.save(path, np.random.default_rng(0).exponential(size=num_samples).astype("<f4"))
    return (WeightTable(path, num_samples),)


def _lookup_us(
    order: OrderSpec, generator: random.Random, lookups: int, *, in_a_row: bool
) -> float:
    first = generator.randrange(_POSITIONS)
    positions = [
        first + number if in_a_row else generator.randrange(_POSITIONS) for number in range(lookups)
    ]
    begin = time.perf_counter()
    for position in positions:
        clip_ref(order, position)
    return (time.perf_counter() - begin) / lookups * 1e6


def _first_batch_seconds(dataset: Path, workers: int) -> float:
    """From opening the dataset, workers started included, to the micro-batch in hand."""
    config = DataConfig(sources=(Source(path=str(dataset)),), workers=workers)
    plan = MicroBatchPlan(
        step=10**6,
        stage=0,
        first_position=_POSITIONS,
        size=8,
        frames=16,
        fps=4.0,
        resolution=256,
        masks=MaskConfig(),
        grid=Grid(t=8, h=16, w=16),
    )
    begin = time.perf_counter()
    collate = partial(collate_plan, seed=1)
    with make_loader(config, plans=(plan,), collate=collate, seed=1) as loader:
        next(loader)
        return time.perf_counter() - begin


if __name__ == "__main__":
    raise SystemExit(main())
