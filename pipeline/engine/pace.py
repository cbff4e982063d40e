"""Slow ranks: each rank's own work compared with the middle rank's.

Ranks wait for one another in every collective, so all of them take the same time for a step. What
differs is what a rank does alone: waiting for its loader, a fixed piece of arithmetic on its
device, and what its process does between two steps.
"""

import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.engine.agree import RankPace
from pipeline.limits import GuardsConfig

_SECTIONS = ("data", "compute", "host")
_IN_A_ROW = 3
# A difference that nobody would notice in a step is no reason for a warning.
_SMALLEST_SHARE = 0.1
_REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank that is slower than the others, comparison after comparison."""

    rank: int
    section: str
    score: float
    """The middle rank's time over this rank's: 1 is as fast as the others, 0 stands still."""
    seconds: float
    """What it needs more than the middle rank, per step; of the arithmetic, per sample of it."""
    host: str = ""

    @property
    def words(self) -> str:
        """How events and the console say it."""
        where = f" on {self.host}" if self.host else ""
        return (
            f"rank {self.rank}{where} is slow in {self.section}: {self.score:.0%} of the middle "
            f"rank's pace, {self.seconds:.3f} s more"
        )


class PaceWatch:
    """Compares the ranks now and then; every rank has one, and all see the same.

    Args:
        config: How often, and what counts as slow.
        hosts: The machine of every rank.
    """

    def __init__(self, config: GuardsConfig, hosts: Sequence[str] = ()) -> None:
        self._config, self._hosts = config, hosts
        self._sums: list[dict[str, float]] = []
        self._num = 0
        self._slow: Counter[tuple[int, str]] = Counter()

    def watch(self, paces: Sequence[RankPace], step_seconds: float) -> list[Straggler]:
        """Takes in a step; tells who has just been slow for the third time in a row."""
        if not self._sums:
            self._sums = [dict.fromkeys(_SECTIONS, 0.0) for _ in paces]
        for sums, pace in zip(self._sums, paces, strict=True):
            for section in _SECTIONS:
                sums[section] += getattr(pace, section)
        self._num += 1
        if self._num < self._config.straggler_every_steps:
            return []
        means = [{name: total / self._num for name, total in sums.items()} for sums in self._sums]
        self._sums, self._num = [], 0
        found = [one for name in _SECTIONS for one in self._compare(name, means, step_seconds)]
        now = {(one.rank, one.section) for one in found}
        self._slow = Counter({key: self._slow[key] + 1 for key in now})
        return [one for one in found if self._slow[one.rank, one.section] == _IN_A_ROW]

    def _compare(
        self, section: str, means: Sequence[dict[str, float]], step_seconds: float
    ) -> list[Straggler]:
        times = [mean[section] for mean in means]
        # The lower middle: of two ranks, the quicker one is what the other is compared with.
        middle = statistics.median_low(times)
        # The arithmetic takes milliseconds whatever a step takes, so only its ratio counts.
        noticeable = 0.0 if section == "compute" else _SMALLEST_SHARE * step_seconds
        return [
            Straggler(
                rank=rank,
                section=section,
                score=middle / seconds,
                seconds=seconds - middle,
                host=self._hosts[rank] if rank < len(self._hosts) else "",
            )
            for rank, seconds in enumerate(times)
            if seconds > 0
            and middle / seconds < self._config.straggler_score
            and seconds - middle > noticeable
        ]


class PaceProbe:
    """A fixed piece of arithmetic, timed: the same on every rank, so its times compare.

    Args:
        device: Where a step computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        size = 4096 if on_gpu else 128
        kind = torch.bfloat16 if on_gpu else torch.float32
        # No random numbers: a run's generators must not notice.
        self._matrix = torch.full((size, size), 1.0 / size, dtype=kind, device=device)

    def seconds(self) -> float:
        """The quickest of a few tries, since the system interrupts some."""
        return min(self._once() for _ in range(_REPEATS))

    def _once(self) -> float:
        self._finish()
        begin = time.perf_counter()
        torch.mm(self._matrix, self._matrix)
        self._finish()
        return time.perf_counter() - begin

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def all_hosts() -> list[str]:
    """The machine of every rank; every rank must call it."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts
