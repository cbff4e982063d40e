"""What workers share: steps of a tiny run with the real engine, and its commits."""

from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoint.load import Found, find_commit
from pipeline.checkpoint.save import SaveRequest, save
from pipeline.checkpoint.staging import HostCopies
from pipeline.engine.resume import schedule_of
from pipeline.engine.save import copy_rank_files
from pipeline.engine.zero import ZeroEngine
from pipeline.environment import Launch, seed_everything
from pipeline.run import RunConfig
from tests.plain import noise_batch, plans, progress_of


def fresh_engine(config: RunConfig) -> ZeroEngine:
    seed_everything(config.seed)
    return ZeroEngine(config, torch.device("cpu"))


def take_steps(
    engine: ZeroEngine, config: RunConfig, launch: Launch, first: int, last: int
) -> list[float]:
    """Losses of the steps `first` to `last`, the same on all ranks."""
    losses = []
    mine = plans(config, launch.rank, launch.world_size, last)
    for step in range(first, last + 1):
        batches = [plan for plan in mine if plan.step == step]
        total = torch.zeros(())
        for number, plan in enumerate(batches):
            result = engine.forward_backward(
                noise_batch(plan, config.seed),
                progress_of(config, plan),
                accumulation=len(batches),
                last=number == len(batches) - 1,
            )
            total += result.total.detach() / len(batches)
        engine.update(config.learning_rate(step), config.weight_decay(step))
        engine.objective.after_step(progress_of(config, batches[-1]))
        dist.all_reduce(total)
        losses.append(total.item() / launch.world_size)
    return losses


def commit(
    engine: ZeroEngine, config: RunConfig, run_dir: Path, launch: Launch, step: int
) -> Found:
    """Saves and publishes a step, and gives what a resume finds of it."""
    groups, schedule = engine.group_table(), schedule_of(config, step)
    state = {"step": step, "groups": groups, "schedule": schedule}
    files = copy_rank_files(engine, HostCopies(), state)
    result = save(
        SaveRequest(
            run_dir=run_dir,
            run_id="test",
            step=step,
            parent_step=None,
            versions={},
            write=files.write,
            rank=launch.rank,
            world_size=launch.world_size,
        )
    )
    assert result.failure is None, result.failure
    dist.barrier()
    return find_commit(run_dir, step)
