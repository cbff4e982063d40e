"""A stage's step with each optimisation switched off in turn.

Each is measured by a process of its own: DeepSpeed keeps every engine of ZeRO-3 for as long as a
process lives, and a GPU has no room for eight of them.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.bench.stages import MemoryFullError, StageFigures, measure_stage
from pipeline.bench.step import OwnStep, measuring
from pipeline.clip import ClipBatch, Losses, Progress
from pipeline.models import rope
from pipeline.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """One thing done otherwise than configured."""

    name: str
    changes: dict[str, Any]
    """Keys of the configuration."""
    alter: Callable[[OwnStep], None] | None = None
    """What is done to the step before it is measured."""


def ablations(config: RunConfig) -> tuple[Ablation, ...]:
    """All that there are: what is on is switched off, what is off is switched on."""
    attention = config.attention
    other = "sdpa" if attention.backend == "fastest" else "fastest"
    stages = tuple(
        stage.model_copy(update={"activation_checkpointing": None}) for stage in config.stages
    )
    return (
        Ablation(name="as configured", changes={}),
        Ablation(name="one pass per mask", changes={}, alter=_one_pass_per_mask),
        Ablation(name="rotary tables in every pass", changes={}, alter=_forget_tables),
        Ablation(
            name="not compiled" if config.compile else "compiled",
            changes={"compile": not config.compile},
        ),
        Ablation(name="plain AdamW", changes={}, alter=_plain_adamw),
        Ablation(
            name="all blocks recomputed",
            changes={"activation_checkpointing": True, "stages": stages},
        ),
        Ablation(
            name="nothing recomputed",
            changes={"activation_checkpointing": False, "stages": stages},
        ),
        Ablation(
            name=f"attention {other}",
            changes={"attention": attention.model_copy(update={"backend": other})},
        ),
    )


def measure_each(
    config: RunConfig,
    stage_index: int,
    rounds: int,
    say: Callable[[str], None] = lambda _words: None,
) -> Iterator[tuple[str, StageFigures | None]]:
    """All of them in a stage, by name; None where one does not fit into the device's memory.

    Args:
        config: The run.
        stage_index: The stage.
        rounds: Steps that are measured.
        say: Is told what is being measured.
    """
    pool = ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
        # Ctrl-C is for whoever waits here, who ends them.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        for one in ablations(config):
            say(f"{config.stages[stage_index].name}, {one.name}")
            yield one.name, pool.submit(_alone, config, one.name, stage_index, rounds).result()
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def _alone(config: RunConfig, name: str, stage_index: int, rounds: int) -> StageFigures | None:
    ablation = next(one for one in ablations(config) if one.name == name)
    with measuring() as device:
        try:
            return measure_ablation(config, ablation, stage_index, device, rounds)
        except MemoryFullError:
            return None


def measure_ablation(
    config: RunConfig, ablation: Ablation, stage_index: int, device: torch.device, rounds: int
) -> StageFigures:
    """Measures one of them with networks of its own."""
    step = OwnStep(config.model_copy(update=ablation.changes), device)
    if ablation.alter is not None:
        ablation.alter(step)
    return measure_stage(step, stage_index, device, rounds)


def _one_pass_per_mask(step: OwnStep) -> None:
    objective = step.engine.objective
    teacher, whole_loss = objective.modules()["teacher"], objective.loss

    def loss(batch: ClipBatch, progress: Progress) -> Losses:
        with _once(teacher):
            parts = [whole_loss(replace(batch, masks=(mask,)), progress) for mask in batch.masks]
        total = torch.stack([part.total for part in parts]).mean()
        return replace(parts[0], total=total)

    _replace(objective, "loss", loss)


@contextmanager
def _once(teacher: torch.nn.Module) -> Iterator[None]:
    """While it lasts, a network that is asked again gives what it gave the first time."""
    forward, given = teacher.forward, []

    def remembered(*args: Any, **options: Any) -> Any:
        if not given:
            given.append(forward(*args, **options))
        return given[0]

    _replace(teacher, "forward", remembered)
    try:
        yield
    finally:
        _replace(teacher, "forward", forward)


def _forget_tables(step: OwnStep) -> None:
    loss = step.engine.objective.loss

    def forgetful(batch: ClipBatch, progress: Progress) -> Losses:
        rope.forget_tables()
        return loss(batch, progress)

    _replace(step.engine.objective, "loss", forgetful)


def _replace(owner: object, method: str, function: Callable[..., Any]) -> None:
    # What is measured here is what training does not do, so training has no switch for it.
    setattr(owner, method, function)


def _plain_adamw(step: OwnStep) -> None:
    for group in step.engine.adam_groups():
        group["fused"] = group["foreach"] = False
