"""Time of our own step: networks, ZeRO engine, optimiser and teacher on one rank, without data."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.clip import ClipBatch, Progress
from pipeline.engine.zero import ZeroEngine
from pipeline.environment import (
    choose_device,
    join_process_group,
    leave_process_group,
    read_launch,
    seed_everything,
    set_cpu_threads,
)
from pipeline.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of the parts of one step on one micro-batch."""

    loss: float
    gradient_seconds: float
    """Teacher, student, predictor, loss and backward of one micro-batch."""
    update_seconds: float
    """Optimiser and teacher; once a step, whatever its micro-batches."""


@contextmanager
def measuring() -> Iterator[torch.device]:
    """A process group of one rank on this machine's device; yields the device."""
    launch = read_launch()
    set_cpu_threads(launch)
    device = choose_device(launch)
    join_process_group(launch, device, timeout_seconds=60.0)
    try:
        yield device
    finally:
        leave_process_group()


class OwnStep:
    """Our engine, taking steps of one micro-batch.

    Args:
        config: The run.
        device: This rank's device; the process group must stand.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self._device = config, device
        seed_everything(config.seed)
        self.engine = ZeroEngine(config, device)
        self._number = 0

    def take(self, batch: ClipBatch) -> StepTime:
        """One step, synchronised with the device at its ends so that its parts can be timed."""
        self._number += 1
        step = min(self._number, self.config.num_steps)
        progress = Progress(step=step, total_steps=self.config.num_steps, stage=batch.stage)
        begin = self._now()
        losses = self.engine.forward_backward(batch, progress, accumulation=1, last=True)
        middle = self._now()
        self.engine.update(self.config.learning_rate(step), self.config.weight_decay(step))
        self.engine.objective.after_step(progress)
        end = self._now()
        return StepTime(
            loss=float(losses.total),
            gradient_seconds=middle - begin,
            update_seconds=end - middle,
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def initial_weights(step: OwnStep) -> dict[str, Tensor]:
    """A copy of the weights of encoder and predictor as they stand; ZeRO stage 3 has only parts.

    Raises:
        ValueError: The engine holds parts of weights.
    """
    if step.config.zero.stage == 3:
        raise ValueError("whole weights are there below ZeRO stage 3 only")
    modules = step.engine.objective.modules()
    return {
        name: value.detach().float().clone()
        for name, value in modules.state_dict().items()
        if not name.startswith("teacher.")
    }


def median_times(
    step: OwnStep, batches: Sequence[ClipBatch], rounds: int, *, warm_up: int = 2
) -> list[StepTime]:
    """Steps over the batches in turn; the first ones, which allocate and compile, are left out."""
    for number in range(warm_up):
        step.take(batches[number % len(batches)])
    return [step.take(batches[number % len(batches)]) for number in range(rounds)]
