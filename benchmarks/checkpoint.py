"""How long training stands still for a checkpoint: ours, DeepSpeed's, and plain torch.save.

Two ranks train and save the same state in turn by all kinds, so that whatever else the machine
does disturbs all alike. Standing still is what the slowest rank needs until it may go on. Ours
copies beside the next step's gradients and writes beside the steps after it: to its standing still
counts how long the update waits for the copy, and what those steps take longer is measured as well.

    python -m benchmarks.checkpoint [--width N] [--depth N] [--rounds N] [--dry]
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.result import print_table, spread, write_result
from pipeline.bench.batches import noise_batches
from pipeline.bench.step import OwnStep, measuring
from pipeline.checkpoint.background import Background
from pipeline.checkpoint.interval import derive_interval
from pipeline.checkpoint.save import SaveRequest, SaveResult, save
from pipeline.checkpoint.staging import HostCopies
from pipeline.engine.save import RankFiles, rank_files
from pipeline.environment import read_launch
from pipeline.files import sync_file
from pipeline.run import RunConfig

_NUM_RANKS = 2
_WARM_UP_STEPS = 2
# Mean hours between failures: 16,000 GPUs (Llama 3), and a day.
_FAILURES = (2.8, 24.0)


def main() -> int:
    """Starts the ranks, or measures as one of them; writes benchmarks/results/checkpoint.json."""
    arguments = _arguments()
    if read_launch().world_size < _NUM_RANKS:
        meet = ["--rdzv_endpoint", "127.0.0.1:0", "--rdzv_backend", "c10d"]
        words = ["--nproc_per_node", str(_NUM_RANKS), *meet, "-m", "benchmarks.checkpoint"]
        command = ["-m", "torch.distributed.run", *words]
        return subprocess.run([sys.executable, *command, *sys.argv[1:]], check=False).returncode
    with tempfile.TemporaryDirectory(dir=arguments.folder) as own, measuring() as device:
        folder = Path(_from_rank_0(own))
        figures = _Bench(arguments, device, folder).run()
        dist.barrier()
    if read_launch().rank == 0:
        _show(figures)
        if not arguments.dry:
            print(write_result("checkpoint", figures, vars(arguments)))
    return 0


class _Bench:
    """One rank's part.

    Args:
        arguments: Of the command line.
        device: This rank's device; the process group stands.
        folder: Shared by the ranks; everything is saved here.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device, folder: Path) -> None:
        self._arguments, self._device, self._folder = arguments, device, folder
        config = _config(arguments, device)
        self._step = OwnStep(config, device)
        self._batches = noise_batches(config, 0, device, 2)
        self._copies = HostCopies()
        self._background: Background[SaveResult] = Background()
        self._num_saves = 0
        self._copied = threading.Event()
        self._copied.set()
        self._held_up_seconds = 0.0
        self._update = self._step.engine.update
        self._step.engine.update = self._wait_and_update

    def run(self) -> dict[str, Any]:
        """All rounds; the first one, which makes buffers and warms caches, is left out."""
        for _ in range(_WARM_UP_STEPS):
            self._take()
        others = {
            "deepspeed": self._deepspeed,
            "torch_save": self._torch_save,
            "torch_save_durable": self._torch_save_durable,
        }
        stalls: dict[str, list[float]] = {kind: [] for kind in ("ours", *others)}
        steps: list[float] = []
        besides: list[_Beside] = []
        for _ in range(1 + self._arguments.rounds):
            steps.append(self._take())
            besides.append(self._beside())
            stalls["ours"].append(besides[-1].stall_seconds)
            for kind, stand_still in others.items():
                stalls[kind].append(self._slowest(stand_still))
        stalls = {kind: seconds[1:] for kind, seconds in stalls.items()}
        return self._figures(stalls, steps[1:], besides[1:])

    def _begin_ours(self) -> None:
        request, files = self._request()
        self._copied.clear()
        self._background.start(lambda: self._save(request, files))

    def _save(self, request: SaveRequest, files: RankFiles) -> SaveResult:
        copied = files.copied(self._copies)
        self._copied.set()
        return save(replace(request, write=copied.write))

    def _wait_and_update(self, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        self._copied.wait()
        self._held_up_seconds += time.perf_counter() - begin
        return self._update(*arguments, **named)

    def _deepspeed(self) -> None:
        self._step.engine._engine.save_checkpoint(str(self._folder / "deepspeed"), tag="state")

    def _torch_save(self) -> None:
        # Copies of the pieces: torch.save of a view writes all that it is a view of.
        tensors = {piece.name: piece.flat.clone() for piece in self._step.engine.pieces()}
        torch.save(tensors, self._folder / f"torch-{dist.get_rank()}.pt")

    def _torch_save_durable(self) -> None:
        self._torch_save()
        sync_file(self._folder / f"torch-{dist.get_rank()}.pt")

    def _request(self) -> tuple[SaveRequest, RankFiles]:
        self._num_saves += 1
        files = rank_files(self._step.engine, {"step": self._num_saves})
        request = SaveRequest(
            run_dir=self._folder,
            run_id="bench",
            step=self._num_saves,
            parent_step=None,
            versions={},
            write=files.write,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            num_bytes=files.num_bytes,
        )
        return request, files

    def _settle(self) -> None:
        """Waits for the save behind, so that it does not slow the next kind down."""
        self._background.wait()
        result = self._background.result()
        if result is not None and result.failure is not None:
            raise SystemExit(result.failure)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder / "checkpoints", ignore_errors=True)
        dist.barrier()

    def _beside(self) -> "_Beside":
        """One save of ours, and the steps that are taken until it is published."""
        self._held_up_seconds = 0.0
        begin, times = time.perf_counter(), []
        stall = self._slowest(self._begin_ours)
        while True:
            times.append(self._take())
            busy = torch.tensor(float(self._background.is_busy), device=self._device)
            dist.all_reduce(busy)
            if not busy.item():
                break
        seconds = time.perf_counter() - begin
        held_up = torch.tensor(self._held_up_seconds, device=self._device)
        dist.all_reduce(held_up, op=dist.ReduceOp.MAX)
        self._settle()
        return _Beside(stall_seconds=stall + held_up.item(), step_seconds=times, seconds=seconds)

    def _take(self) -> float:
        batch = self._batches[self._num_saves % len(self._batches)]
        return self._slowest(lambda: self._step.take(batch))

    def _slowest(self, action: Callable[[], object]) -> float:
        dist.barrier()
        begin = time.perf_counter()
        action()
        own = torch.tensor(time.perf_counter() - begin, device=self._device)
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
        return own.item()

    def _figures(
        self, stalls: dict[str, list[float]], steps: list[float], besides: list["_Beside"]
    ) -> dict[str, Any]:
        num_bytes = torch.tensor(sum(p.flat.nbytes for p in self._step.engine.pieces()))
        dist.all_reduce(num_bytes)
        median = {kind: statistics.median(seconds) for kind, seconds in stalls.items()}
        step = statistics.median(steps)
        behind = statistics.median(one.seconds for one in besides)
        slowed = [sum(one.step_seconds) - step * len(one.step_seconds) for one in besides]
        others = [kind for kind in stalls if kind != "ours"]
        return {
            "state_mib": round(num_bytes.item() / 2**20, 1),
            "stall_ms": {kind: spread([1e3 * s for s in stalls[kind]], 2) for kind in stalls},
            **{f"ours_to_{kind}": round(median["ours"] / median[kind], 4) for kind in others},
            "step_ms": spread([1e3 * s for s in steps], 1),
            "stall_to_step": round(median["ours"] / step, 4),
            "published_after_seconds": round(behind, 3),
            "steps_beside_take_longer_ms": spread([1e3 * s for s in slowed], 1),
            "at_derived_interval": [_at_interval(median["ours"], behind, m) for m in _FAILURES],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Beside:
    """A save behind the training."""

    stall_seconds: float
    """Of the slowest rank: collecting the pieces, and the update's wait for the copy."""
    step_seconds: list[float]
    """Steps until it was published."""
    seconds: float
    """From its beginning to its publication."""


def _at_interval(stall: float, behind: float, hours: float) -> dict[str, Any]:
    interval = derive_interval(stall, behind, hours)
    return {
        "hours_between_failures": hours,
        "interval_seconds": round(interval.seconds, 1),
        "stall_share": round(stall / interval.seconds, 6),
    }


def _show(figures: dict[str, Any]) -> None:
    rows = [
        (kind, seconds["median"], seconds["min"], seconds["max"])
        for kind, seconds in figures["stall_ms"].items()
    ]
    print_table("Training stands still, ms", ("", "median", "min", "max"), rows)
    others = {key: value for key, value in figures.items() if key != "stall_ms"}
    print(json.dumps(others, indent=1))


def _config(arguments: argparse.Namespace, device: torch.device) -> RunConfig:
    network = {"size": "vit_tiny", "width": arguments.width, "depth": arguments.depth}
    stage = {"frames": 4, "fps": 4.0, "resolution": 64, "micro_batch": 1}
    settings = {
        "name": "checkpoint",
        "global_batch": _NUM_RANKS,
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "stages": [
            {**stage, "name": "one", "steps": 10_000}
            | {"learning_rate": {"shape": "constant", "peak": 1e-4}}
        ],
        "objective": {
            "kind": "jepa",
            "encoder": {**network, "heads": arguments.width // 64},
            "predictor": {"width": 192, "depth": 2, "heads": 6},
        },
        "zero": {"stage": arguments.zero},
        "data": {"sources": [{"path": "none-is-read"}]},
    }
    return RunConfig.model_validate_json(json.dumps(settings))


def _from_rank_0(value: str) -> str:
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--zero", type=int, default=3, choices=(0, 1, 2, 3))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to save to; the system's temporary folder")
    parser.add_argument("--dry", action="store_true", help="print only, write no result")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
