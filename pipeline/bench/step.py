"""Time of our own step: networks, ZeRO engine, optimiser and teacher on one rank, without data."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.clip import ClipBatch, Progress
from pipeline.engine.deepspeed_import import leave_groups
from pipeline.engine.tune import StageTuner
from pipeline.engine.zero import ZeroEngine
from pipeline.environment import (
    choose_device,
    join_process_group,
    read_launch,
    seed_everything,
    set_cpu_threads,
)
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions
from pipeline.run import RunConfig
from pipeline.stages import StagePlace
from pipeline.track.sinks import Tracker


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
    """A process group of one rank on this machine's device; yields the device.

    Leaves the process as it was, so that another may follow.
    """
    launch = read_launch()
    set_cpu_threads(launch)
    device = choose_device(launch)
    join_process_group(launch, device, timeout_seconds=60.0)
    try:
        yield device
    finally:
        leave_groups()


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
        nobody = Tracker(config.track, is_main=False)
        self.tuner = StageTuner(config, read_launch(), device, self.engine, nobody)
        self._number = 0

    def begin(self, stage_index: int) -> None:
        """Sets the networks as training does at the begin of a stage."""
        stage = self.config.stages[stage_index]
        self.tuner.begin(StagePlace(index=stage_index, stage=stage, step_in_stage=1), 1)

    def take(self, batch: ClipBatch) -> StepTime:
        """One step, synchronised with the device at its ends so that its parts can be timed."""
        self.begin(batch.stage)
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
            loss=losses.total.item(),
            gradient_seconds=middle - begin,
            update_seconds=end - middle,
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """The weights of encoder and predictor that a run begins with, whatever its ZeRO stage."""
    seed_everything(config.seed)
    options = BuildOptions(attention=config.attention, checkpoint_activations=False)
    weights = build_objective(config.objective, options).modules().state_dict()
    return {name: value for name, value in weights.items() if not name.startswith("teacher.")}


def take_steps(
    step: OwnStep, batches: Sequence[ClipBatch], rounds: int, *, warm_up: int = 2
) -> list[StepTime]:
    """Steps over the batches in turn, after those that allocate and compile."""
    for number in range(warm_up):
        step.take(batches[number % len(batches)])
    return [step.take(batches[number % len(batches)]) for number in range(rounds)]
