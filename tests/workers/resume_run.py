"""Worker: takes up a run at this number of ranks, in every way that its first rank is told.

Reports, for each thing done, what the test compares: losses as hexadecimal numbers, fingerprints.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoint.fingerprint import combine_ranks, fingerprint_pieces
from pipeline.checkpoint.load import find_commit
from pipeline.engine.resume import take_up
from pipeline.engine.zero import ZeroEngine
from pipeline.environment import Launch, join_process_group, read_launch
from pipeline.errors import CheckpointError
from pipeline.run import RunConfig
from tests.plain import tiny_config
from tests.workers.training import commit, fresh_engine, take_steps


def long_config(zero_stage: int, precision: str, num_steps: int) -> RunConfig:
    """One stage whose rate, decay and momentum change from step to step."""
    short = json.loads(tiny_config().model_dump_json())["stages"][0]
    return tiny_config(
        zero_stage, precision=precision, stages=[{**short, "steps": num_steps, "micro_batch": 4}]
    )


def go_on(out: Path, launch: Launch, stage: int, precision: str, at: int, last: int) -> dict:
    """Trains to `at`, saves, trains to `last`; then again from the commit in a new engine."""
    config = long_config(stage, precision, last)
    run_dir = out / f"stage-{stage}-{precision}"
    engine = fresh_engine(config)
    take_steps(engine, config, launch, 1, at)
    found = commit(engine, config, run_dir, launch, at)
    without = take_steps(engine, config, launch, at + 1, last)
    again = fresh_engine(config)
    said = take_up(again, found, config).words
    after = take_steps(again, config, launch, at + 1, last)
    return {
        "without": [loss.hex() for loss in without],
        "after": [loss.hex() for loss in after],
        "ends": [held(engine), held(again)],
        "said": said,
    }


def pass_on(out: Path, launch: Launch, source: str, stage: int, steps: int) -> dict:
    """Takes up the newest commit of another run, trains on, and saves it as a run of its own."""
    config = long_config(stage, "fp32", 60)
    found = find_commit(Path(source))
    engine = fresh_engine(config)
    before = held(engine)
    said = take_up(engine, found, config).words
    first = found.commit.step + 1
    found = commit(engine, config, out / "passed-on", launch, found.commit.step)
    losses = take_steps(engine, config, launch, first, first + steps - 1) if steps else []
    return {
        "said": said,
        "before": before,
        "fingerprints": found.manifest.fingerprints,
        "losses": losses,
        "draw": torch.rand(1).item(),
    }


def refuse(out: Path, launch: Launch, source: str) -> dict:
    """Takes up a run in ways in which something does not arrive, and tells what is said of it."""
    config = long_config(3, "bf16", 60)
    found = find_commit(Path(source))
    name = next(n for n in found.manifest.fingerprints if n.startswith("exp_avg/predictor."))
    prints = {**found.manifest.fingerprints, name: "0" * 16}
    wrong = replace(found, manifest=replace(found.manifest, fingerprints=prints))
    engine = fresh_engine(config)
    said = {"name": name, "wrong": error_of(lambda: take_up(engine, wrong, config))}
    small = engine.objective.modules().get_parameter("encoder.blocks.0.norm1.weight")
    said["before"] = str(engine.stale_copies())
    small.data.add_(1.0)
    said["stale"] = str(engine.stale_copies())
    deeper = config.objective.model_copy(
        update={"predictor": config.objective.predictor.model_copy(update={"depth": 2})}
    )
    other = config.model_copy(update={"objective": deeper})
    said["other"] = error_of(lambda: take_up(fresh_engine(other), found, other))
    slower = long_config(3, "bf16", 61)
    said["changes"] = str(take_up(fresh_engine(slower), found, slower).changes)
    return said


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return f"{error} {error.remedy}"
    return "nothing was wrong"


def held(engine: ZeroEngine) -> dict[str, str]:
    """Fingerprints of everything that all ranks hold."""
    own = fingerprint_pieces(engine.pieces())
    gathered: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return combine_ranks(gathered)


def main(out: Path, tasks: list[dict]) -> None:
    launch = read_launch()
    join_process_group(launch, torch.device("cpu"), timeout_seconds=60)
    doings = {"go_on": go_on, "pass_on": pass_on, "refuse": refuse}
    report = [doings[task.pop("do")](out, launch, **task) for task in tasks]
    (out / f"rank-{launch.rank}.json").write_text(json.dumps(report))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
