"""One rank of the cost model's benchmark: steps of our engine, or bare collectives, timed."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.bench.batches import noise_batches
from pipeline.bench.step import OwnStep, measuring, take_steps
from pipeline.environment import end_rank, read_launch
from pipeline.run import RunConfig

_SIZES = (1 << 12, 1 << 22)
_REPEATS = 5


def main() -> int:
    """`python -m benchmarks.plan_rank KIND OUT ROUNDS CONFIG`: writes OUT/rank-R.json."""
    kind, out, rounds, config = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    rank = read_launch().rank
    with measuring() as device:
        if kind == "links":
            measured: Any = _links()
        else:
            measured = _steps(RunConfig.model_validate_json(config), device, rounds)
    (out / f"rank-{rank}.json").write_text(json.dumps(measured))
    return 0


def _steps(config: RunConfig, device: torch.device, rounds: int) -> list[dict[str, float]]:
    """Medians of gradients and update, for every stage of the configuration."""
    step = OwnStep(config, device)
    found = []
    for index in range(len(config.stages)):
        # All the same batch: its FLOPs are exact, and ranks do the same work.
        batches = noise_batches(config, index, device, 1)
        times = take_steps(step, batches, rounds, warm_up=3)
        found.append(
            {
                "gradient_seconds": statistics.median(one.gradient_seconds for one in times),
                "update_seconds": statistics.median(one.update_seconds for one in times),
            }
        )
    return found


def _links() -> dict[str, float]:
    """Seconds of an all-gather of a few bytes, and GB/s on the bus of one of many."""
    world = dist.get_world_size()
    seconds = []
    for size in _SIZES:
        own = torch.zeros(size // world)
        whole = torch.empty(size // world * world)
        seconds.append(_best(lambda own=own, whole=whole: dist.all_gather_into_tensor(whole, own)))
    moved = (_SIZES[1] - _SIZES[0]) * 4 * (world - 1) / world
    return {
        "latency_seconds": seconds[0],
        "gb_per_second": moved / max(1e-9, seconds[1] - seconds[0]) / 1e9,
    }


def _best(work: Callable[[], Any]) -> float:
    taken = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


if __name__ == "__main__":
    end_rank(main())
