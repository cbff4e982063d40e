"""Is it motion that was learned? The same probe on frames in order and on frames shuffled in time.

The synthetic classes are pairs of which one is the other played backwards: single pictures cannot
tell the two apart. So of the clips that a head puts into their own pair, the share in the right
half (chance 50 %) says what it knows of the direction of time, and shuffling must take it away.
Takes the run of `make learn`, or several runs that differ in their training seed alone: `--run A B
C`. Spreads are over all runs and probe seeds.
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
from pipeline.probe.records import wilson_interval

_ORDERS = ("forward", "shuffled")
_CHANCE_PERCENT = 50.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Probes both ends of every run in both orders, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, nargs="+", default=[Path("runs/learn")])
    parser.add_argument("--data", type=Path, default=Path("runs/learn-data"))
    parser.add_argument("--seeds", type=int, default=3, help="probe seeds of each run")
    parser.add_argument("--changes", default="", help="key=value laid over the probe task")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures")
    asked = parser.parse_args(arguments)
    scores: list[dict[str, Any]] = []
    for order in _ORDERS:
        records = [record for run in asked.run for record in _probed(run, order, asked)]
        scores += [score_row(order, one, records) for one in ("untrained", "trained")]
    figures = {"scores": scores, **verdict(scores)}
    settings = {
        "runs": [run.name for run in asked.run],
        "probe_seeds": asked.seeds,
        "changes": asked.changes,
    }
    say(f"written to {write_result('motion', figures, settings, folder=asked.out)}")
    _show(scores)
    say("\n".join(f"{name.replace('_', ' ')}: {held}" for name, held in figures["holds"].items()))
    return 0


def _probed(run: Path, order: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    out = Path("runs/motion") / run.name / order
    found = jepa_json(
        f"{probe_words(run, asked.data, '0,last')} --head linear --seeds {asked.seeds} "
        f"--out {out} clip.frame_order={order} {asked.changes}"
    )
    return found["records"]


def direction_share(record: dict[str, Any]) -> float:
    """Of the clips put into their own pair of classes, the share in the right half of it."""
    right, wrong = _direction_counts(record)
    return right / max(1, right + wrong)


def score_row(order: str, encoder: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over runs and probe seeds.

    Args:
        order: Of the frames.
        encoder: `untrained`, the records of step 0, or `trained`, the others.
        records: Of both, as `jepa probe --json` gives them.
    """
    own = [record for record in records if (record["step"] == 0) == (encoder == "untrained")]
    top1 = [100 * record["top1"] for record in own]
    direction = [100 * direction_share(record) for record in own]
    # Runs and seeds answer about the same clips: their answers are no more clips.
    clips = round(statistics.mean(sum(_direction_counts(record)) for record in own))
    low, high = wilson_interval(statistics.mean(direction) / 100, max(1, clips))
    return {
        "frames": order,
        "encoder": encoder,
        "steps": sorted({record["step"] for record in own}),
        "num_scores": len(own),
        "top1_percent": round(statistics.mean(top1), 1),
        "top1_least": round(min(top1), 1),
        "top1_greatest": round(max(top1), 1),
        "direction_percent": round(statistics.mean(direction), 1),
        "direction_least": round(min(direction), 1),
        "direction_greatest": round(max(direction), 1),
        "direction_interval": [round(100 * low, 1), round(100 * high, 1)],
    }


def verdict(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Trained less untrained in points, the least that any two scores are apart, and what holds."""
    at = {(score["frames"], score["encoder"]): score for score in scores}
    advantage = [_advantage(at[order, "untrained"], at[order, "trained"]) for order in _ORDERS]
    forward, shuffled = at["forward", "trained"], at["shuffled", "trained"]
    low, high = shuffled["direction_interval"]
    return {
        "advantage": advantage,
        "holds": {
            "trained_above_untrained_outside_the_spread": advantage[0]["top1_least_gap"] > 0,
            "direction_above_chance_in_order": forward["direction_interval"][0] > _CHANCE_PERCENT,
            "direction_at_chance_when_shuffled": low <= _CHANCE_PERCENT <= high,
            "shuffling_takes_the_advantage": (
                advantage[1]["top1_points"] < advantage[0]["top1_points"] / 2
            ),
        },
    }


def _direction_counts(record: dict[str, Any]) -> tuple[int, int]:
    """Clips put into their own class, and into the same action played the other way."""
    number = {name: place for place, name in enumerate(record["class_names"])}
    other: dict[int, int] = {}
    for pair in PAIRS:
        forward, backward = number.get(bare(pair.forward)), number.get(bare(pair.backward))
        if forward is not None and backward is not None:
            other |= {forward: backward, backward: forward}
    right = sum(num for truth, answer, num in record["confusion"] if truth == answer)
    wrong = sum(num for truth, answer, num in record["confusion"] if other.get(truth) == answer)
    return right, wrong


def _advantage(untrained: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    return {
        "frames": trained["frames"],
        **{
            f"{name}_points": round(trained[f"{name}_percent"] - untrained[f"{name}_percent"], 1)
            for name in ("top1", "direction")
        },
        **{
            f"{name}_least_gap": round(trained[f"{name}_least"] - untrained[f"{name}_greatest"], 1)
            for name in ("top1", "direction")
        },
    }


def _show(scores: list[dict[str, Any]]) -> None:
    rows = [
        (
            f"{score['frames']}, {score['encoder']}",
            score["top1_percent"],
            score["direction_percent"],
            f"{score['direction_least']} – {score['direction_greatest']}",
        )
        for score in scores
    ]
    headings = ("frames and encoder", "top-1 %", "right direction %", "over scores")
    print_table("Motion: linear probe, chance 8.3 % and 50 %", headings, rows)


if __name__ == "__main__":
    sys.exit(main())
