"""A run's whole configuration: the one place that names every section.

Numbers that follow from others (steps in all, accumulation, tokens) are functions, never stored.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.checkpoint.layout import CheckpointConfig
from pipeline.clip import Grid
from pipeline.config.section import Section
from pipeline.data.stream import DataConfig
from pipeline.limits import GuardsConfig, StopConfig
from pipeline.masks.blocks import MaskConfig, check_masks
from pipeline.masks.kept import expected_kept
from pipeline.models.attention import AttentionConfig
from pipeline.objectives import AnyObjectiveConfig
from pipeline.optim import OptimizerConfig
from pipeline.schedule import cosine, learning_rate
from pipeline.stages import Recompute, Stage, place_of_step, total_steps
from pipeline.track.metrics import StageCost, TrackConfig

_COST_MICRO_BATCHES = 16


class ZeroConfig(Section):
    """How DeepSpeed spreads weights and optimiser state over the ranks."""

    stage: Literal[0, 1, 2, 3] = 3
    """0 keeps everything on every rank, 1 spreads optimiser state, 2 gradients too, 3 weights."""
    persistence_threshold: int = Field(default=100_000, ge=0)
    """Parameters up to this many elements stay whole on every rank under stage 3."""
    prefetch_bucket_size: int = Field(default=50_000_000, ge=0)
    """Elements that stage 3 gathers ahead of their use."""
    reduce_bucket_size: int = Field(default=50_000_000, ge=1)
    """Elements of gradient that are summed over the ranks at once: smaller ones begin earlier
    beside the backward pass and take less memory, larger ones use the network better."""


class RunConfig(Section):
    """Everything that decides what a run computes, and how it is kept."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its folder."""
    runs_folder: Path = Path("runs")
    """Folder that holds the folders of runs."""
    seed: int = Field(default=239, ge=0, lt=2**63)
    """Decides initial weights, sample order, crops and masks."""
    global_batch: int = Field(ge=1)
    """Clips per optimiser step, all ranks together, in every stage."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Numbers that networks compute in; optimiser state and teacher average are always fp32."""
    stages: tuple[Stage, ...] = Field(min_length=1, strict=False)
    """What is trained one after the other: clip length, rate, size and learning rate of each."""
    masks: MaskConfig = MaskConfig()
    """Masks of every clip and the rule that cuts them; stages may have their own."""
    init_from: Path | None = None
    """Start from these weights with a fresh optimiser: a run, a checkpoint, what `jepa ckpt import`
    made, or a folder of transformers. Sizes must agree. A resumed run does not read it again."""
    objective: AnyObjectiveConfig
    """What is learnt, and with which networks."""
    data: DataConfig
    """Where clips come from and how they are prepared."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW's settings."""
    zero: ZeroConfig = ZeroConfig()
    """How weights and optimiser state are spread over the ranks."""
    attention: AttentionConfig = AttentionConfig()
    """Attention kernel and position encoding."""
    activation_checkpointing: Recompute = False
    """Compute activations again in the backward pass instead of keeping them: less memory, up to
    a third more time; `auto` does so in as many blocks as each stage's memory asks for."""
    compile: bool = False
    """Compile every block with torch.compile: faster on GPUs, for a minute or so at a stage's
    first steps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which are kept."""
    track: TrackConfig = TrackConfig()
    """What is logged, how often and where."""
    guards: GuardsConfig = GuardsConfig()
    """What is checked before every update, and when a rank counts as hanging."""
    stop: StopConfig = StopConfig()
    """When the run stops by itself, and what it has time for when asked to."""
    peer_timeout_seconds: float = Field(default=600.0, gt=0.0)
    """How long a rank waits for the others before it gives up."""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {', '.join(twice)}: give each its own name")
        for stage in self.stages:
            grid = self.objective.grid(stage.frames, stage.resolution)
            check_masks(self.masks_of(stage).blocks, grid)
            if self.global_batch % stage.micro_batch:
                raise ValueError(
                    f"global_batch {self.global_batch} is not a multiple of stage {stage.name}'s "
                    f"micro_batch {stage.micro_batch}"
                )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.runs_folder / self.name

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all stages together."""
        return total_steps(self.stages)

    def grid(self, frames: int, resolution: int) -> Grid:
        """Tokens of a clip."""
        return self.objective.grid(frames, resolution)

    def masks_of(self, stage: Stage) -> MaskConfig:
        """The masks of a stage: the run's, with what the stage has of its own."""
        return stage.masks_over(self.masks)

    def recompute(self, stage: Stage) -> Recompute:
        """Activation checkpointing of a stage."""
        own = stage.activation_checkpointing
        return self.activation_checkpointing if own is None else own

    def learning_rate(self, step: int) -> float:
        """Learning rate of a 1-based step."""
        place = place_of_step(self.stages, step)
        return learning_rate(place.stage.learning_rate, place.step_in_stage, place.stage.steps)

    def weight_decay(self, step: int) -> float:
        """Weight decay of a 1-based step."""
        return cosine(self.optimizer.weight_decay, step, self.num_steps)

    def stage_costs(self) -> list[StageCost]:
        """What a step of each stage costs beside the others, for progress and the time left."""
        return [self._stage_cost(stage) for stage in self.stages]

    def _stage_cost(self, stage: Stage) -> StageCost:
        grid = self.grid(stage.frames, stage.resolution)
        # Only ratios between stages count: a few micro-batches tell them well enough.
        drawn = expected_kept(self.masks_of(stage), grid, stage.micro_batch, _COST_MICRO_BATCHES)
        kept = [(mask.context, mask.target) for mask in drawn]
        flops = self.objective.training_flops(grid, kept) * self.global_batch
        return StageCost(name=stage.name, steps=stage.steps, flops_per_step=flops)
