"""Worker: the real engine trains networks of an official checkpoint, at several ZeRO stages."""

import json
import sys
from pathlib import Path

import torch

from pipeline.checkpoint.pieces import WholeTensors
from pipeline.environment import join_process_group, read_launch
from pipeline.exchange.official import read_official
from pipeline.exchange.sizes import Heads
from pipeline.exchange.source import ImportOptions
from tests.plain import tiny_config
from tests.workers.training import commit, fresh_engine, take_steps


def main(out: Path, checkpoint: str, heads: list[int], num_steps: int, changes: dict) -> None:
    launch = read_launch()
    join_process_group(launch, torch.device("cpu"), timeout_seconds=60)
    torch.set_num_threads(1)
    found = Heads(encoder=heads[0], predictor=heads[1])
    source = read_official(Path(checkpoint), ImportOptions(heads=found))
    report = {}
    for stage in (0, 3):
        engine = fresh_engine(tiny_config(stage, **changes))
        report[f"lacking-{stage}"] = engine.load_weights(WholeTensors(dict(source.tensors)))
        losses = take_steps(engine, tiny_config(stage, **changes), launch, 1, num_steps)
        report[f"losses-{stage}"] = losses
        commit(engine, tiny_config(stage, **changes), out / f"zero-{stage}", launch, num_steps)
    (out / f"rank-{launch.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
