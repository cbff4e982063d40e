"""Is it motion that was learned? The same probe on frames in order and on frames shuffled in time.

The synthetic classes are pairs of which one is the other played backwards: single pictures cannot
tell the two apart. So of the clips that a head puts into their own pair, the share in the right
half (chance 50 %) says what it knows of the direction of time, and shuffling must take it away.
Takes the run of `make learn`; each figure is the mean of three seeds.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import jepa_json, probe_words, say
from benchmarks.result import RESULTS, print_table, write_result
from data_prep.synthetic.classes import PAIRS, bare

_ORDERS = ("forward", "shuffled")


def main(arguments: Sequence[str] | None = None) -> int:
    """Probes both ends of a run in both orders, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/learn"))
    parser.add_argument("--data", type=Path, default=Path("runs/learn-data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--changes", default="", help="key=value laid over the probe task")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures")
    asked = parser.parse_args(arguments)
    scores: list[dict[str, Any]] = []
    for order in _ORDERS:
        words = probe_words(asked.run, asked.data, "0,last")
        out = Path("runs/motion") / asked.run.name / order
        found = jepa_json(
            f"{words} --head linear --seeds {asked.seeds} --out {out} "
            f"clip.frame_order={order} {asked.changes}"
        )
        scores += [_row(order, step, found["records"]) for step in _steps(found["records"])]
    figures = {"scores": scores, "advantage": [_advantage(order, scores) for order in _ORDERS]}
    settings = {"run": asked.run.name, "seeds": asked.seeds, "changes": asked.changes}
    say(f"written to {write_result('motion', figures, settings, folder=asked.out)}")
    _show(scores)
    return 0


def direction_share(record: dict[str, Any]) -> float:
    """Of the clips put into their own pair of classes, the share in the right half of it."""
    number = {name: place for place, name in enumerate(record["class_names"])}
    other: dict[int, int] = {}
    for pair in PAIRS:
        forward, backward = number.get(bare(pair.forward)), number.get(bare(pair.backward))
        if forward is not None and backward is not None:
            other |= {forward: backward, backward: forward}
    right = sum(num for truth, answer, num in record["confusion"] if truth == answer)
    wrong = sum(num for truth, answer, num in record["confusion"] if other.get(truth) == answer)
    return right / max(1, right + wrong)


def _row(order: str, step: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    own = [record for record in records if record["step"] == step]
    top1 = [100 * record["top1"] for record in own]
    direction = [100 * direction_share(record) for record in own]
    return {
        "frames": order,
        "step": step,
        "top1_percent": round(statistics.mean(top1), 1),
        "top1_least": round(min(top1), 1),
        "top1_greatest": round(max(top1), 1),
        "direction_percent": round(statistics.mean(direction), 1),
        "direction_least": round(min(direction), 1),
        "direction_greatest": round(max(direction), 1),
    }


def _advantage(order: str, scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Trained less untrained, in points, and the least that any two seeds are apart."""
    untrained, trained = [score for score in scores if score["frames"] == order]
    return {
        "frames": order,
        **{
            f"{name}_points": round(trained[f"{name}_percent"] - untrained[f"{name}_percent"], 1)
            for name in ("top1", "direction")
        },
        **{
            f"{name}_least_gap": round(trained[f"{name}_least"] - untrained[f"{name}_greatest"], 1)
            for name in ("top1", "direction")
        },
    }


def _steps(records: list[dict[str, Any]]) -> list[int]:
    return sorted({record["step"] for record in records})


def _show(scores: list[dict[str, Any]]) -> None:
    rows = [
        (
            f"{score['frames']}, step {score['step']}",
            score["top1_percent"],
            score["direction_percent"],
            f"{score['direction_least']} – {score['direction_greatest']}",
        )
        for score in scores
    ]
    headings = ("frames and checkpoint", "top-1 %", "right direction %", "over seeds")
    print_table("Motion: linear probe, chance 8.3 % and 50 %", headings, rows)


if __name__ == "__main__":
    sys.exit(main())
