"""Probe scores of several checkpoints as one table for people."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pipeline.probe.records import ProbeRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a head gains between two checkpoints: mean top-1 over seeds, the later less the first.

    `interval95` covers the luck of the draw of validation clips, as if both checkpoints had been
    scored on clips of their own; the same clips make it somewhat too wide.
    """

    head: str
    from_step: int
    to_step: int
    top1: float
    interval95: tuple[float, float]


def differences(records: Sequence[ProbeRecord]) -> list[Difference]:
    """The gain of each head between its first and its last step."""
    found: list[Difference] = []
    for head, of_head in _by_head(records).items():
        steps = sorted({record.step for record in of_head if record.step is not None})
        if len(steps) < 2:
            continue
        first, last = (_mean(of_head, step) for step in (steps[0], steps[-1]))
        num = min(record.num_val for record in of_head)
        half = 1.96 * ((first * (1 - first) + last * (1 - last)) / num) ** 0.5
        gain = last - first
        found.append(
            Difference(
                head=head,
                from_step=steps[0],
                to_step=steps[-1],
                top1=gain,
                interval95=(gain - half, gain + half),
            )
        )
    return found


def render(records: Sequence[ProbeRecord], out: Path) -> list[Table | str]:
    """The table, and below it what the scores rest on."""
    steps = sorted({record.step for record in records}, key=lambda step: step or 0)
    any_record = records[0]
    table = Table(title=f"{any_record.task}: top-1 on {any_record.num_val} validation clips")
    table.add_column("head")
    for step in steps:
        table.add_column(_column(step, any_record), justify="right")
    gains = {gain.head: gain for gain in differences(records)}
    if gains:
        table.add_column("difference", justify="right")
    table.add_column("chance", justify="right")
    for head, of_head in _by_head(records).items():
        cells = [_score([one for one in of_head if one.step == step]) for step in steps]
        gain = [_gain(gains[head])] if head in gains else []
        table.add_row(head, *cells, *gain, f"{any_record.chance:.1%}")
    return [table, *_footer(records, out)]


def _column(step: int | None, record: ProbeRecord) -> str:
    if step is None:
        return Path(record.checkpoint).name
    return f"step {step}" + (" (untrained)" if step == 0 else "")


def _footer(records: Sequence[ProbeRecord], out: Path) -> list[str]:
    any_record = records[0]
    lines = [
        f"Frozen {any_record.which}; heads fitted on {any_record.num_train} clips of "
        f"{any_record.num_classes} classes. {_spread_words(records)}"
    ]
    lines += sorted({f"{record.head}: {record.rule}." for record in records})
    lines += _other_rules(records)
    faults = {name: num for name, num in any_record.num_faults.items() if num}
    if faults:
        words = ", ".join(f"{num} of {name}" for name, num in faults.items())
        lines.append(f"Videos left out as missing or undecodable: {words}.")
    return [*lines, f"{len(records)} result{'s' * (len(records) != 1)} in {out}"]


def _spread_words(records: Sequence[ProbeRecord]) -> str:
    """What stands behind the scores: of one seed an interval, of several how far they differ."""
    seeds = Counter((record.head, record.step) for record in records).values()
    words = []
    if 1 in seeds:
        words.append("In brackets: 95 % interval for this many clips.")
    if max(seeds) > 1:
        words.append("± behind a score: standard deviation over its seeds.")
    if differences(records):
        words.append("± behind a difference: 95 % interval for this many clips.")
    return " ".join(words)


def _other_rules(records: Sequence[ProbeRecord]) -> list[str]:
    """What the rule that is not the task's own would have reported."""
    lines = []
    for head, of_head in _by_head(records).items():
        steps = sorted({record.step for record in of_head}, key=lambda step: step or 0)
        told = []
        for step in steps:
            found = [o for r in of_head if r.step == step for o in r.rules[1:]]
            if found:
                mean = statistics.mean(one["top1"] for one in found)
                told.append(f"{mean:.1%} at {_column(step, of_head[0])}")
        if told:
            name = of_head[0].rules[1]["rule"]
            lines.append(f"{head}, chosen {name} instead: {', '.join(told)}.")
    return lines


def _score(records: Sequence[ProbeRecord]) -> str:
    if not records:
        return "–"
    shares = [record.top1 for record in records]
    if len(shares) > 1:
        return f"{statistics.mean(shares):.1%} ± {100 * statistics.stdev(shares):.1f}"
    low, high = records[0].top1_interval
    return f"{shares[0]:.1%} ({100 * low:.0f}–{100 * high:.0f})"


def _gain(gain: Difference) -> str:
    half = (gain.interval95[1] - gain.interval95[0]) / 2
    return f"{100 * gain.top1:+.1f} ± {100 * half:.1f}"


def _by_head(records: Iterable[ProbeRecord]) -> dict[str, list[ProbeRecord]]:
    found: dict[str, list[ProbeRecord]] = {}
    for record in records:
        found.setdefault(record.head, []).append(record)
    return found


def _mean(records: Sequence[ProbeRecord], step: int) -> float:
    return statistics.mean(record.top1 for record in records if record.step == step)
