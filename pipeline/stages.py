"""The progressive-resolution scheduler: which stage a step belongs to, and its micro-batches.

A run is a list of stages, each with its own clip length, frame rate, resolution, micro-batch and
learning rate; the global batch stays the same. Everything is a function of (stages, step), so a
resume inside a stage or at its border needs the step and nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from pipeline.clip import Grid, MicroBatchPlan
from pipeline.config.section import Section
from pipeline.errors import ConfigError
from pipeline.masks.blocks import MaskConfig, StageMasks
from pipeline.schedule import LearningRate

Recompute: TypeAlias = bool | Literal["auto"]
"""Which blocks compute their activations again: all, none, or as many as memory asks for."""


class Stage(Section):
    """A stretch of the run in which all clips have one size."""

    name: str = Field(min_length=1)
    """What this stage is called in logs, reports and metrics; unique in the run."""
    steps: int = Field(ge=1)
    """Optimiser steps of this stage."""
    frames: int = Field(ge=1)
    """Frames of a clip; a multiple of the encoder's tubelet_size."""
    fps: float = Field(gt=0.0)
    """Frames taken per second of video; frames / fps is the clip's length in seconds."""
    resolution: int = Field(ge=1)
    """Height and width of a clip in pixels; a multiple of the encoder's patch_size."""
    micro_batch: int = Field(ge=1)
    """Clips that one GPU handles at once; with masks.truncate=min also a property of the recipe,
    because masks are cut to the shortest of a micro-batch."""
    learning_rate: LearningRate
    """Learning rate over this stage's steps."""
    masks: StageMasks | None = None
    """Masks of this stage, where they are not the run's."""
    activation_checkpointing: Recompute | None = None
    """Activation checkpointing of this stage; the run's if left out."""

    @model_validator(mode="after")
    def _learning_rate_fits(self) -> Self:
        self.learning_rate.check(self.steps)
        return self

    def masks_over(self, masks: MaskConfig) -> MaskConfig:
        """The run's masks, with what this stage has of its own."""
        return masks if self.masks is None else self.masks.over(masks)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlace:
    """Where a step of the run stands."""

    index: int
    stage: Stage
    step_in_stage: int
    """1-based."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The part of every global batch that one rank handles."""

    global_batch: int
    rank: int
    world_size: int


def total_steps(stages: Sequence[Stage]) -> int:
    """Optimiser steps of all stages together."""
    return sum(stage.steps for stage in stages)


def place_of_step(stages: Sequence[Stage], step: int) -> StagePlace:
    """Stage of a 1-based step of the run.

    Raises:
        ValueError: The run has no such step.
    """
    step_in_stage = step
    for index, stage in enumerate(stages):
        if 1 <= step_in_stage <= stage.steps:
            return StagePlace(index=index, stage=stage, step_in_stage=step_in_stage)
        step_in_stage -= stage.steps
    raise ValueError(f"step {step} is not one of the run's 1 … {total_steps(stages)}")


def accumulation(stage: Stage, global_batch: int, world_size: int) -> int:
    """Micro-batches that each rank handles per optimiser step: B / (b · R).

    Raises:
        ConfigError: The global batch is not a multiple of micro_batch × world_size; the message
            names the nearest values that would do.
    """
    num_micro_batches, rest = divmod(global_batch, stage.micro_batch * world_size)
    if rest == 0:
        return num_micro_batches
    raise ConfigError(
        f"stage {stage.name}: global_batch {global_batch} is not a multiple of micro_batch "
        f"{stage.micro_batch} × {world_size} processes",
        remedy=_what_divides(stage.micro_batch, global_batch, world_size),
    )


def micro_batch_plans(
    stages: Sequence[Stage],
    share: Share,
    first_step: int,
    last_step: int,
    masks: MaskConfig,
    grid_of: Callable[[int, int], Grid],
) -> Iterator[MicroBatchPlan]:
    """Every micro-batch of one rank, in the order in which it is trained on.

    Step s covers the positions [(s−1)·B, s·B), cut into micro-batches of b clips; rank r handles
    the A = B/(b·R) consecutive ones from r·A. The cut does not depend on the world size, so the
    same micro-batches, and with them the same masks, come up at any.

    Args:
        stages: All stages of the run.
        share: Global batch, rank and world size.
        first_step: 1-based step to begin with; a resume begins after the last one saved.
        last_step: Last step to plan, inclusive.
        masks: The run's masks.
        grid_of: Tokens of a clip from (frames, resolution): `EncoderConfig.grid`.

    Raises:
        ConfigError: A stage's micro-batch does not divide the global batch.
    """
    for step in range(first_step, last_step + 1):
        place = place_of_step(stages, step)
        stage = place.stage
        num_micro_batches = accumulation(stage, share.global_batch, share.world_size)
        first_position = (step - 1) * share.global_batch
        first_position += share.rank * num_micro_batches * stage.micro_batch
        for number in range(num_micro_batches):
            yield MicroBatchPlan(
                step=step,
                stage=place.index,
                first_position=first_position + number * stage.micro_batch,
                size=stage.micro_batch,
                frames=stage.frames,
                fps=stage.fps,
                resolution=stage.resolution,
                masks=stage.masks_over(masks),
                grid=grid_of(stage.frames, stage.resolution),
            )


def _what_divides(micro_batch: int, global_batch: int, world_size: int) -> str:
    divisors = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
    sizes = [n for n in divisors if (global_batch // n) % world_size == 0]
    worlds = [n for n in divisors if (global_batch // n) % micro_batch == 0]
    options = []
    if sizes:
        options.append(f"micro_batch {_nearest(sizes, micro_batch)}")
    if worlds:
        options.append(f"{_nearest(worlds, world_size)} processes")
    unit = micro_batch * world_size
    above = -(-global_batch // unit) * unit
    batches = f"{above - unit} or {above}" if above > unit else f"{above}"
    options.append(f"global_batch {batches}")
    return f"Use {', or '.join(options)}."


def _nearest(values: Sequence[int], wanted: int) -> str:
    """The nearest value below and above, those there are."""
    below = [value for value in values if value < wanted]
    above = [value for value in values if value > wanted]
    return " or ".join(str(value) for value in (*below[-1:], *above[:1]))
