"""Worker: bare DeepSpeed, without any of our code, doing what we work around."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as convert
from torch import Tensor, nn

TRAINED, FROZEN, BUFFER = "student.weight", "teacher.weight", "scale"


class Net(nn.Module):
    """A trained layer, a frozen one that it learns from, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(24, 16)
        self.teacher = nn.Linear(24, 16).requires_grad_(False)
        self.register_buffer("scale", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.student(x) - self.teacher(x)).square().mean() * self.scale.sum()


def fresh(seed: int, *, threshold: int = 0, universal: bool = False, accumulation: int = 1) -> Any:
    """A new engine whose weights depend on the seed alone, with two parameter groups."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }
    torch.manual_seed(seed)
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = Net()
    groups = [
        {"params": [net.student.weight], "lr": 1e-2, "weight_decay": 0.4},
        {"params": [net.student.bias], "lr": 5e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def steps(engine: Any, num: int) -> None:
    for _ in range(num):
        engine.backward(engine(torch.ones(1, 24)))
        engine.step()


def values(engine: Any) -> dict[str, Tensor]:
    """Everything whole, as the network computes with it."""
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        found = {name: p.detach().clone() for name, p in parameters.items()}
    return found | {name: b.detach().clone() for name, b in engine.module.named_buffers()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, bool]:
    return {name: one[name].equal(other[name]) for name in (TRAINED, FROZEN, BUFFER)}


def checkpoints(out: Path) -> dict:
    """Two saves of one engine, read back in the ways that DeepSpeed offers."""
    folder = str(out / "two")
    engine = fresh(1)
    steps(engine, 2)
    older = values(engine)
    engine.save_checkpoint(folder, tag="older")
    steps(engine, 2)
    newer = values(engine)
    engine.save_checkpoint(folder, tag="newer")

    found = {}
    read = fresh(2)
    path, _ = read.load_checkpoint(folder, tag="older", load_optimizer_states=False)
    found["asked_for_older"] = {
        "path": Path(path).parent.name,
        "is_older": values(read)[TRAINED].equal(older[TRAINED]),
        "is_newer": values(read)[TRAINED].equal(newer[TRAINED]),
    }
    read = fresh(3)
    before = values(read)
    path, _ = read.load_checkpoint(folder, tag="newer", load_module_only=True)
    found["module_only"] = {
        "path": Path(path).parent.name,
        "as_saved": same(values(read), newer),
        "as_before": same(values(read), before),
    }
    return found | {"universal": universal(folder, newer)} | {"missing": missing(out, folder)}


def universal(folder: str, saved: dict[str, Tensor]) -> dict:
    if dist.get_rank() == 0:
        convert(
            Namespace(
                input_folder=f"{folder}/newer",
                output_folder=f"{folder}/newer_universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
    dist.barrier()
    read = fresh(4, universal=True)
    before = values(read)
    read.load_checkpoint(folder)
    groups = [(g["lr"], g["weight_decay"]) for g in read.optimizer.param_groups]
    return {
        "as_saved": same(values(read), saved),
        "as_before": same(values(read), before),
        "groups": groups,
    }


def missing(out: Path, folder: str) -> dict:
    read = fresh(5)
    nothing = read.load_checkpoint(str(out / "nowhere"))
    try:
        read.load_checkpoint(folder, tag="no-such-tag")
    except AssertionError as error:
        return {"nothing": list(nothing), "wrong_tag": str(error)}
    return {"nothing": list(nothing), "wrong_tag": "no error"}


def accumulation(out: Path) -> dict:
    """A checkpoint between two micro-batches of one step."""
    engine = fresh(6, accumulation=2)
    steps(engine, 1)
    engine.save_checkpoint(str(out / "middle"), tag="t")
    read = fresh(7, accumulation=2)
    read.load_checkpoint(str(out / "middle"), tag="t")
    return {"saved_at": engine.micro_steps, "resumed_at": read.micro_steps}


def writes() -> dict:
    """Ways to write a frozen parameter that have no effect."""
    engine = fresh(8)
    weight = engine.module.teacher.weight
    before = values(engine)[FROZEN]
    with deepspeed.zero.GatheredParameters([weight]):
        weight.data.fill_(5.0)
    discarded = values(engine)[FROZEN].equal(before)
    engine = fresh(9, threshold=100_000)
    steps(engine, 1)  # gathers small parameters for good
    weight = engine.module.teacher.weight
    weight.ds_tensor.data.fill_(5.0)
    live = weight.data.numel() == 24 * 16 and not bool((weight.data == 5.0).any())
    return {"gathered_write_is_discarded": discarded, "small_parameter_stays_stale": live}


def torn(out: Path) -> dict:
    """The second rank dies before it has written; the first one finishes."""
    folder = out / "torn"
    engine = fresh(10)
    if dist.get_rank() == 1:

        def die(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        engine.checkpoint_engine.save = die
    try:
        engine.save_checkpoint(str(folder), tag="half")
    except OSError:
        dist.barrier()  # where the first rank is by now
    names = sorted(path.name for path in (folder / "half").iterdir())
    latest = folder / "latest"
    return {"latest": latest.read_text() if latest.exists() else None, "files": names}


def main(out: Path) -> None:
    deepspeed.init_distributed(dist_backend="gloo")
    report = {
        "checkpoints": checkpoints(out),
        "accumulation": accumulation(out),
        "writes": writes(),
        "torn": torn(out),
    }
    rank = dist.get_rank()
    (out / f"rank-{rank}.json").write_text(json.dumps(report))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
