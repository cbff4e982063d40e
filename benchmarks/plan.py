"""How well the cost model tells the step time of 1, 2 and 4 ranks on the machine at hand.

What a rank computes in a second, what gloo moves, and what ZeRO-3's calls cost are measured with
one network; the steps of another network, larger and at other clip sizes, are then predicted and
measured. Figures are errors of those predictions.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result import print_table, write_result
from launch.local import start_ranks
from pipeline.config.load import SHIPPED_CONFIGS, load_config
from pipeline.environment import free_port
from pipeline.plan.cluster import Cluster
from pipeline.plan.memory import trained_params
from pipeline.plan.steptime import StageWork, stage_masks, stage_work, step_time
from pipeline.run import RunConfig

_RANKS = (1, 2, 4)
_MEMORY_GIB = 16.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of one network and its clips."""

    width: int
    depth: int
    heads: int
    frames: tuple[int, ...]
    resolution: int
    micro_batch: int


# The first is measured to calibrate, at two clip lengths, so far apart that their difference is
# more than noise; the second is predicted.
_KNOWN = Sizes(width=256, depth=4, heads=4, frames=(8, 32), resolution=64, micro_batch=4)
_ASKED = Sizes(width=320, depth=8, heads=5, frames=(8, 16), resolution=96, micro_batch=2)


def main() -> int:
    """Calibrates, predicts, measures and compares."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="*", default=list(_RANKS))
    rounds, ranks = parser.parse_args().rounds, parser.parse_args().ranks
    rows, figures = [], {}
    for number in ranks:
        cluster = _calibrated(number, rounds)
        asked = _config(_ASKED, number)
        measured = _run("steps", number, rounds, asked)
        for index, seen in enumerate(measured):
            seconds = seen["gradient_seconds"] + seen["update_seconds"]
            predicted = step_time(asked, index, _work(asked, index, number), cluster, number)
            error = predicted.seconds / seconds - 1
            name = f"{number} rank(s), {asked.stages[index].name}"
            figures[name] = {
                "measured_seconds": seconds,
                "predicted_seconds": predicted.seconds,
                "predicted_communication_seconds": predicted.communication_seconds,
                "error": error,
            }
            rows.append((name, f"{seconds:.3f}", f"{predicted.seconds:.3f}", f"{error:+.1%}"))
        figures[f"{number} rank(s), calibration"] = _shown(cluster)
    print_table("Seconds of a step", ("", "measured", "predicted", "error"), rows)
    path = write_result("plan", figures, {"rounds": rounds, "known": str(_KNOWN)})
    print(f"written to {path}")
    return 0


def _calibrated(ranks: int, rounds: int) -> Cluster:
    """The machine as a node of so many ranks, from steps of the known network."""
    known = _config(_KNOWN, ranks)
    # Ranks that do not talk, all at a time: what a rank computes while the others do.
    alone = _run("alone", ranks, rounds, _config(_KNOWN, 1))
    works = [_work(_config(_KNOWN, 1), index, 1) for index in range(2)]
    flops = [one.model_flops for one in works]
    times = [one["gradient_seconds"] for one in alone]
    if times[1] < 1.5 * times[0]:
        raise SystemExit(
            f"{ranks} rank(s): clips four times as long took {times[1] / times[0]:.2f} times as "
            "long, so the machine was busy with something else; measure again, with more --rounds"
        )
    rate = (flops[1] - flops[0]) / (times[1] - times[0])
    overhead = max(0.0, times[0] - flops[0] / rate)
    student, teacher = trained_params(known)
    links = _links(ranks, rounds, known)
    cluster = Cluster(
        name="this machine",
        gpus_per_node=ranks,
        peak_tflops=rate / 1e12,
        best_efficiency=1.0,
        half_tokens=0.0,
        micro_batch_overhead_ms=1e3 * overhead,
        step_overhead_ms=0.0,
        update_ns_per_parameter=1e9 * alone[0]["update_seconds"] / (student + teacher),
        overlap=0.0,
        intra_node_gb_per_second=max(1e-3, links["gb_per_second"]),
        intra_node_latency_us=1e6 * links["latency_seconds"] / max(1, ranks - 1),
        collective_overhead_us=0.0,
        cores_per_gpu=1000.0,
    )
    # What is left between steps that talk and the model without calls is what the calls cost.
    together = _run("steps", ranks, rounds, known)[0] if ranks > 1 else alone[0]
    seconds = together["gradient_seconds"] + together["update_seconds"]
    bare = step_time(known, 0, _work(known, 0, ranks), cluster, ranks).seconds
    one_us = cluster.model_copy(update={"collective_overhead_us": 1.0})
    per_us = step_time(known, 0, _work(known, 0, ranks), one_us, ranks).seconds - bare
    return cluster.model_copy(
        update={"collective_overhead_us": max(0.0, (seconds - bare) / per_us)}
    )


def _work(config: RunConfig, index: int, ranks: int) -> StageWork:
    return stage_work(config, index, stage_masks(config, index), ranks, _MEMORY_GIB)


def _links(ranks: int, rounds: int, config: RunConfig) -> dict[str, float]:
    if ranks == 1:
        return {"latency_seconds": 0.0, "gb_per_second": 1000.0}
    return _run("links", ranks, rounds, config)


def _run(kind: str, ranks: int, rounds: int, config: RunConfig) -> Any:
    """What rank 0 measured; `alone` starts as many ranks that know nothing of each other."""
    with tempfile.TemporaryDirectory() as name:
        module = "benchmarks.plan_alone" if kind == "alone" else "benchmarks.plan_rank"
        words = ["-m", module, kind, name, str(rounds), config.model_dump_json()]
        code = start_ranks(words, num_ranks=ranks, port=free_port())
        if code:
            raise SystemExit(code)
        return json.loads((Path(name) / "rank-0.json").read_text())


def _config(sizes: Sizes, ranks: int) -> RunConfig:
    """A run of one step size: every rank takes one micro-batch a step."""
    base = load_config(SHIPPED_CONFIGS / "tiny-cpu.yaml", RunConfig).config
    rate = {"shape": "constant", "peak": 1e-4}
    stages = [
        {
            "name": f"{frames}-frames", "steps": 100, "frames": frames, "fps": 4.0,
            "resolution": sizes.resolution, "micro_batch": sizes.micro_batch,
            "learning_rate": rate,
        }
        for frames in sizes.frames
    ]  # fmt: skip
    content = json.loads(base.model_dump_json()) | {
        "global_batch": sizes.micro_batch * ranks,
        "stages": stages,
        # Masks of one length: every micro-batch has the FLOPs that were reckoned.
        "masks": {**json.loads(base.masks.model_dump_json()), "truncate": "fixed"},
        "zero": {"stage": 3, "persistence_threshold": 10_000},
        "track": {"mlflow": {"enabled": False}},
    }
    encoder = {"size": "vit_tiny", "width": sizes.width, "depth": sizes.depth}
    content["objective"]["encoder"] = encoder | {"heads": sizes.heads}
    return RunConfig.model_validate_json(json.dumps(content))


def _shown(cluster: Cluster) -> dict[str, float]:
    names = (
        "peak_tflops", "micro_batch_overhead_ms", "update_ns_per_parameter",
        "intra_node_gb_per_second", "intra_node_latency_us", "collective_overhead_us",
    )  # fmt: skip
    return {name: getattr(cluster, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
