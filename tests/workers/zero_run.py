"""Worker: trains the tiny run with the real engine on this rank and saves a commit."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.environment import join_process_group, read_launch
from tests.plain import tiny_config
from tests.workers.training import commit, fresh_engine, take_steps


def main(out: Path, zero_stage: int, num_steps: int, changes: dict) -> None:
    launch = read_launch()
    join_process_group(launch, torch.device("cpu"), timeout_seconds=60)
    config = tiny_config(zero_stage, **changes)
    engine = fresh_engine(config)
    losses = take_steps(engine, config, launch, 1, num_steps)
    live = {
        name: module.weight.detach().float().abs().sum().item()
        for name, module in engine.objective.modules().named_modules()
        if name.startswith("teacher") and name.endswith("norm1")
    }
    commit(engine, config, out, launch, num_steps)
    report = {"losses": losses, "groups": engine.group_table(), "live": live}
    (out / f"rank-{launch.rank}.json").write_text(json.dumps(report))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
