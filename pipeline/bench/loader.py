"""How fast a configuration's loader is on its own data, and what one worker makes of a core."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import psutil

from pipeline.bench.batches import stage_plan
from pipeline.data.loader import make_loader
from pipeline.masks.collate import collate_plan
from pipeline.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderFigures:
    """One round of one stage; the first micro-batches, which find workers starting, left out."""

    clips: int
    clips_per_second: float
    clips_per_cpu_second: float
    """CPU time of this process and its workers: it does not depend on other work nearby."""

    def to_dict(self) -> dict[str, Any]:
        """For a result file."""
        return asdict(self)


def measure_loader(
    config: RunConfig, stage_index: int, num_batches: int, *, first: int = 0
) -> LoaderFigures:
    """Loads micro-batches of a stage as training would, and throws them away.

    Args:
        config: The run; its data must be there.
        stage_index: The stage.
        num_batches: Micro-batches that count.
        first: Number of the first micro-batch, so that rounds need not read the same clips.
    """
    data = config.data
    warm_up = max(1, data.workers)
    # Workers end with their plans, and their CPU time would go with them: there is more to do than
    # is taken. What is loaded ahead of the last one was loaded ahead of the first one, too.
    ahead = data.workers * (data.prefetch + 2)
    numbers = range(first, first + warm_up + num_batches + ahead)
    plans = tuple(stage_plan(config, stage_index, number) for number in numbers)
    collate = partial(collate_plan, seed=config.seed)
    with make_loader(data, plans=plans, collate=collate, seed=config.seed) as loader:
        for _ in range(warm_up):
            next(loader)
        begin, cpu_begin = time.perf_counter(), _cpu_seconds()
        clips = sum(len(next(loader).keys) for _ in range(num_batches))
        seconds, cpu_seconds = time.perf_counter() - begin, _cpu_seconds() - cpu_begin
    return LoaderFigures(
        clips=clips,
        clips_per_second=clips / max(seconds, 1e-9),
        clips_per_cpu_second=clips / max(cpu_seconds, 1e-9),
    )


def _cpu_seconds() -> float:
    total = 0.0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
