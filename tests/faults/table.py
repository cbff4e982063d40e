"""From what was seen to the table of promises."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.faults.evidence import Seen, nodes_of
from tests.faults.promises import PROMISES, Promise

# What the figures of the long run are held to.
MAX_SHARE_LOST_TO_THE_MODEL = 0.01
MAX_RESUME_TO_COLD = 1.25
MAX_MIB_PER_1000_STEPS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    number: int
    fault: str
    kept: str
    seen: str
    verdict: str
    """`pass`, `FAIL`, `not run` or `not covered`."""
    gap: str


def part_verdicts(parts: Mapping[str, Any], log: str) -> dict[str, tuple[bool, str]]:
    """Whether each part of the long run kept what it had to, and what was seen."""
    storm, mutants, soak = parts["storm"], parts["mutants"], parts["soak"]
    storm_kept = (
        storm.same_losses and not storm.unexpected and storm.max_steps_lost <= 2 * storm.save_every
    )
    seen = (
        f"{sum(storm.faults.values())} faults in {storm.starts} starts, at most "
        f"{storm.max_steps_lost} steps lost, losses "
        f"{'equal bit for bit' if storm.same_losses else 'DIFFER'}"
    )
    if storm.unexpected:
        seen += f"; unexpected: {storm.unexpected[0][:200]}"
    return {
        "storm": (storm_kept, seen),
        "mutants": _mutants_verdict(mutants, log),
        "soak": _soak_verdict(soak),
    }


def judge(
    seen: Mapping[str, Seen], verdicts: Mapping[str, tuple[bool, str]], *, with_tests: bool
) -> list[Row]:
    """One row per promise."""
    return [_row(promise, seen, verdicts, with_tests=with_tests) for promise in PROMISES]


def markdown(rows: list[Row], parts: Mapping[str, Any], settings: argparse.Namespace) -> str:
    """The table and the figures, as they are committed."""
    lines = [
        "# What faults were done to runs, and what was kept",
        "",
        f"`make faults` with {settings.faults} faults, {settings.mutants} mutated videos and "
        f"{settings.soak} steps of soak; seed {settings.seed}.",
        "",
        "| # | fault | promised | seen | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gap = f" (not covered: {row.gap})" if row.gap else ""
        cells = (row.number, row.fault, row.kept, row.seen + gap, row.verdict)
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join([*lines, "", *_figures(parts), ""])


def _figures(parts: Mapping[str, Any]) -> list[str]:
    storm = parts["storm"]
    to_cold = storm.resume_seconds / storm.cold_start_seconds
    to_model = storm.effective_share / storm.predicted_share
    return [
        "## Figures of the storm",
        "",
        f"- Command to first step: cold {storm.cold_start_seconds} s, resumed "
        f"{storm.resume_seconds} s (median), {to_cold:.2f} of a cold start; goal ≤ "
        f"{MAX_RESUME_TO_COLD}: {_met(to_cold <= MAX_RESUME_TO_COLD)}.",
        f"- Time in steps that count: {storm.effective_share:.1%}; the interval model predicts "
        f"{storm.predicted_share:.1%} from the measured stall, interval and restart: "
        f"{to_model:.3f} of it; goal ≥ {1 - MAX_SHARE_LOST_TO_THE_MODEL}: "
        f"{_met(to_model >= 1 - MAX_SHARE_LOST_TO_THE_MODEL)}.",
        f"- **Projection**, not a measurement: at one failure per 2.8 h, with the stall of "
        f"{storm.stall_seconds} s and the restarts of this run at its best interval, the same "
        f"model gives {storm.projected_share:.2%}.",
    ]


def _met(is_met: bool) -> str:
    return "met" if is_met else "NOT met"


def _mutants_verdict(report: Any, log: str) -> tuple[bool, str]:
    if report is None:
        return False, f"the trainer died: {log[:300]}"
    seen = (
        f"{report.mutants} mutants, 0 trainer deaths, {report.lost_workers} workers lost, "
        f"{report.decoded} decoded, {sum(report.refused.values())} refused, peak memory of a "
        f"worker +{report.worker_growth_mib} MiB of {report.cap_mib:g} allowed"
    )
    return report.worker_growth_mib <= report.cap_mib, seen


def _soak_verdict(report: Any) -> tuple[bool, str]:
    kept = (
        report.exit_code == 0
        and report.mib_per_1000_steps <= MAX_MIB_PER_1000_STEPS
        and max(report.files_growth, report.threads_growth, report.shared_memory_growth) <= 1
    )
    seen = (
        f"{report.steps} steps, {report.mib_per_1000_steps} MiB per 1,000 steps, files "
        f"{report.files_growth:+d}, threads {report.threads_growth:+d}, shared memory "
        f"{report.shared_memory_growth:+d}"
    )
    return kept, seen


def _row(
    promise: Promise,
    seen: Mapping[str, Seen],
    verdicts: Mapping[str, tuple[bool, str]],
    *,
    with_tests: bool,
) -> Row:
    nodes = nodes_of(promise.tests)
    words = [verdicts[part][1] for part in promise.parts]
    kept = [verdicts[part][0] for part in promise.parts]
    if with_tests and nodes:
        found = [seen.get(node) for node in nodes]
        passed = sum(one.passed for one in found if one)
        missing = [node for node, one in zip(nodes, found, strict=True) if one is None]
        failed = [message for one in found if one for message in one.failed]
        skipped = sum(one.skipped for one in found if one)
        kept.append(not missing and not failed and passed > 0)
        words.append(f"{passed} checks passed" + (f", {skipped} skipped" if skipped else ""))
        words += [f"not found: {missing}"] if missing else []
        words += [f"failed: {failed[0]}"] if failed else []
    verdict = "pass" if all(kept) else "FAIL"
    if not kept:
        verdict = "not run" if nodes else "not covered"
    return Row(
        number=promise.number,
        fault=promise.fault,
        kept=promise.kept,
        seen="; ".join(words) or "–",
        verdict=verdict,
        gap=promise.gap,
    )
