"""Worker: trains the tiny run with the real engine on this rank and saves a commit."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoint.save import SaveRequest, save
from pipeline.engine.save import write_rank_files
from pipeline.engine.zero import ZeroEngine
from pipeline.environment import join_process_group, read_launch, seed_everything
from tests.plain import noise_batch, plans, progress_of, tiny_config


def main(out: Path, zero_stage: int, num_steps: int, changes: dict) -> None:
    launch = read_launch()
    device = torch.device("cpu")
    join_process_group(launch, device, timeout_seconds=60)
    config = tiny_config(zero_stage, **changes)
    seed_everything(config.seed)
    engine = ZeroEngine(config, device)
    losses = []
    mine = plans(config, launch.rank, launch.world_size, num_steps)
    for step in range(1, num_steps + 1):
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
    live = {
        name: module.weight.detach().float().abs().sum().item()
        for name, module in engine.objective.modules().named_modules()
        if name.startswith("teacher") and name.endswith("norm1")
    }
    request = SaveRequest(
        run_dir=out,
        run_id="test",
        step=num_steps,
        parent_step=None,
        versions={},
        write=lambda folder: write_rank_files(engine, folder, {"step": num_steps}),
    )
    result = save(request)
    report = {
        "losses": losses,
        "failure": result.failure,
        "groups": engine.group_table(),
        "live": live,
    }
    (out / f"rank-{launch.rank}.json").write_text(json.dumps(report))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
