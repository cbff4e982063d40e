"""Worker: fresh engines that start from given weights; saves what each of them holds then."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.engine.init import load_initial, open_initial
from pipeline.environment import Launch, join_process_group, read_launch
from pipeline.errors import JepaError
from tests.plain import tiny_config
from tests.workers.training import commit, fresh_engine, take_steps


def start(out: Path, launch: Launch, name: str, case: dict) -> dict:
    run_dir = out / name
    run_dir.mkdir(exist_ok=True)
    config = tiny_config(
        3, name=name, runs_folder=str(out), init_from=case["path"], precision=case["precision"]
    )
    source = open_initial(config)
    assert source is not None
    engine = fresh_engine(config)
    origin = load_initial(engine, config, source)
    optimizer_pieces = sum(piece.is_optimizer_state for piece in engine.pieces())
    commit(engine, config, run_dir, launch, 0)
    # Small parameters have a gathered copy each, which is what the network computes with.
    live = {
        name: parameter.data.float().tolist()
        for name, parameter in engine.objective.modules().named_parameters()
        if getattr(parameter, "ds_persist", False)
    }
    losses = take_steps(engine, config, launch, 1, 1)
    told = {"live": live, "optimizer_pieces": optimizer_pieces, "losses": losses}
    return {**told, "origin": origin.to_dict()}


def refused(out: Path, path: str) -> str:
    changes = {"encoder": {"width": 48, "depth": 1, "heads": 4, "patch_size": 8}}
    objective = {"kind": "jepa", **changes, "predictor": {"width": 24, "depth": 1, "heads": 2}}
    config = tiny_config(3, runs_folder=str(out), init_from=path, objective=objective)
    try:
        open_initial(config)
    except JepaError as error:
        return f"{type(error).__name__}: {error} {error.remedy}"
    return "taken"


def main(out: Path, cases: dict, wrong: str) -> None:
    launch = read_launch()
    join_process_group(launch, torch.device("cpu"), timeout_seconds=60)
    report = {name: start(out, launch, name, case) for name, case in cases.items()}
    report["refused"] = refused(out, wrong)
    (out / f"rank-{launch.rank}.json").write_text(json.dumps(report))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
