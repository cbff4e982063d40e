"""The method as a plain single-process PyTorch loop: what the sharded engine is compared with."""

import copy
import json
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.clip import ClipBatch, ClipRef, MicroBatchPlan, Progress
from pipeline.masks.sample import sample_masks
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions
from pipeline.run import RunConfig
from pipeline.stages import Share, micro_batch_plans


def tiny_config(zero_stage: int = 3, **changes) -> RunConfig:
    """A run of two stages whose clip length, resolution and micro-batch differ."""
    rate = {"shape": "linear", "start": 1e-3, "peak": 2e-3, "end": 1e-4, "warmup_steps": 2}
    stage = {"steps": 3, "frames": 4, "fps": 4.0, "resolution": 32, "micro_batch": 2}
    small = {"num_blocks": 2, "spatial_scale": [0.3, 0.3]}
    network = {"size": "vit_tiny", "width": 48, "depth": 2, "heads": 2, "patch_size": 8}
    settings = {
        "name": "tiny",
        "global_batch": 8,
        "precision": "fp32",
        "stages": [
            {**stage, "name": "short", "learning_rate": rate},
            {
                **stage,
                "name": "long",
                "frames": 8,
                "resolution": 48,
                "micro_batch": 1,
                "learning_rate": {"shape": "constant", "peak": 1e-3},
            },
        ],
        "masks": [small, {**small, "num_blocks": 1, "spatial_scale": [0.6, 0.6]}],
        "objective": {
            "kind": "jepa",
            "encoder": network,
            "predictor": {"width": 24, "depth": 1, "heads": 2},
            "momentum": {"start": 0.9, "end": 0.95},
        },
        "optimizer": {"weight_decay": {"start": 0.04, "end": 0.4}},
        "zero": {"stage": zero_stage, "persistence_threshold": 2000},
        "data": {"sources": [{"path": "unused"}]},
        "track": {"mlflow": {"enabled": False}},
        **changes,
    }
    return RunConfig.model_validate_json(json.dumps(settings))


def plans(config: RunConfig, rank: int, world_size: int, last_step: int) -> list[MicroBatchPlan]:
    """This rank's micro-batches of the first steps."""
    share = Share(global_batch=config.global_batch, rank=rank, world_size=world_size)
    return list(micro_batch_plans(config.stages, share, 1, last_step, config.masks, config.grid))


def noise_batch(plan: MicroBatchPlan, seed: int) -> ClipBatch:
    """A micro-batch of random pixels, each clip a function of its global position."""
    clips = []
    for position in plan.positions:
        generator = torch.Generator().manual_seed(position)
        size = (3, plan.frames, plan.resolution, plan.resolution)
        clips.append(torch.randint(0, 256, size, dtype=torch.uint8, generator=generator))
    return ClipBatch(
        step=plan.step,
        stage=plan.stage,
        first_position=plan.first_position,
        grid=plan.grid,
        keys=tuple(str(p) for p in plan.positions),
        refs=tuple(ClipRef(position=p, source=0, sample=p, epoch=0) for p in plan.positions),
        video_BCTHW=torch.stack(clips),
        times_BT=torch.zeros(plan.size, plan.frames, dtype=torch.float64),
        masks=sample_masks(plan.masks, plan.grid, seed, list(plan.positions)),
    )


def progress_of(config: RunConfig, plan: MicroBatchPlan) -> Progress:
    """Where the run stands at a micro-batch."""
    return Progress(step=plan.step, total_steps=config.num_steps, stage=plan.stage)


@dataclass(frozen=True)
class PlainResult:
    losses: list[float]
    weights: dict[str, torch.Tensor]


def plain_run(config: RunConfig, num_steps: int) -> PlainResult:
    """Trains on whole global batches without DeepSpeed, sharding or our optimiser grouping."""
    torch.manual_seed(config.seed)
    options = BuildOptions(attention=config.attention, checkpoint_activations=False)
    objective = build_objective(config.objective, options)
    modules = objective.modules()
    student, teacher = modules["encoder"], modules["teacher"]
    teacher.load_state_dict(copy.deepcopy(student.state_dict()))
    trained = {n: p for n, p in modules.named_parameters() if not n.startswith("teacher.")}
    decayed = [p for n, p in trained.items() if p.dim() > 1 and "bias" not in n]
    kept = [p for n, p in trained.items() if p.dim() <= 1 or "bias" in n]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": kept, "weight_decay": 0.0}])
    losses = []
    for step in range(1, num_steps + 1):
        batches = [plan for plan in plans(config, 0, 1, num_steps) if plan.step == step]
        total = torch.stack(
            [
                objective.loss(noise_batch(p, config.seed), progress_of(config, p)).total
                for p in batches
            ]
        ).mean()
        optimizer.zero_grad()
        total.backward()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        optimizer.param_groups[0]["weight_decay"] = config.weight_decay(step)
        optimizer.step()
        _average(student, teacher, 0.9 + (step - 1) / config.num_steps * 0.05)
        losses.append(total.item())
    weights = {name: p.detach().clone() for name, p in modules.named_parameters()}
    return PlainResult(losses=losses, weights=weights)


def _average(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
        old.data = momentum * old.data + (1 - momentum) * new.detach()
