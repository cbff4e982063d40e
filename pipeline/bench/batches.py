"""Micro-batches to measure with: noise as pictures, and the masks that training would draw."""

from functools import partial

import torch

from pipeline.clip import Clip, ClipBatch, ClipRef, MicroBatchPlan
from pipeline.masks.collate import collate_plan
from pipeline.run import RunConfig


def stage_plan(config: RunConfig, stage_index: int, number: int = 0) -> MicroBatchPlan:
    """The plan of a stage's micro-batch with this number, counted from the run's first clip."""
    stage = config.stages[stage_index]
    return MicroBatchPlan(
        step=1,
        stage=stage_index,
        first_position=number * stage.micro_batch,
        size=stage.micro_batch,
        frames=stage.frames,
        fps=stage.fps,
        resolution=stage.resolution,
        masks=config.masks_of(stage),
        grid=config.grid(stage.frames, stage.resolution),
    )


def noise_batch(
    config: RunConfig, stage_index: int, device: torch.device, number: int = 0
) -> ClipBatch:
    """A micro-batch of a stage: the size and the masks of training, noise as pictures."""
    plan = stage_plan(config, stage_index, number)
    draw = torch.Generator().manual_seed(config.seed + number)
    clips = [_noise_clip(plan, position, draw) for position in plan.positions]
    return collate_plan(clips, plan, seed=config.seed).to(device)


def noise_batches(
    config: RunConfig, stage_index: int, device: torch.device, count: int
) -> tuple[ClipBatch, ...]:
    """Several micro-batches of a stage; their masks keep different numbers of tokens."""
    return tuple(map(partial(noise_batch, config, stage_index, device), range(count)))


def _noise_clip(plan: MicroBatchPlan, position: int, draw: torch.Generator) -> Clip:
    size = (plan.frames, plan.resolution, plan.resolution, 3)
    video_THWC = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
    return Clip(
        ref=ClipRef(position=position, source=0, sample=position, epoch=0),
        key=f"noise-{position}",
        video_CTHW=video_THWC.permute(3, 0, 1, 2),
        times=torch.arange(plan.frames, dtype=torch.float64) / plan.fps,
    )
