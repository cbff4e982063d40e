"""The sections that are tables, bars and pictures."""

import json
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from pipeline.report.charts import Chart, Series, picture, svg
from pipeline.report.facts import RunFacts
from pipeline.report.features import FeatureMapRow
from pipeline.report.html import (
    Markup,
    duration,
    figure,
    figures,
    folded,
    missing,
    moment,
    number,
    percent,
    section,
    table,
    text,
)
from pipeline.report.probes import Comparison, Point
from pipeline.track.folder import CONFIG_FILE
from pipeline.track.ledger import Ledger
from pipeline.track.rates import wait_share, window_rates

_MOST_ROWS = 200
_LEDGER_COLOURS = {
    "Computing steps that count": "var(--c1)",
    "Waiting for data": "var(--c2)",
    "Starting": "var(--c4)",
    "Saving": "var(--c3)",
    "Lost: steps taken again after a resume": "var(--bad)",
    "Down between attempts": "var(--soft)",
    "Other gaps between steps": "var(--line)",
}


def probe_section(facts: RunFacts, comparisons: Sequence[Comparison]) -> str:
    """Trained beside untrained, with the line of chance, and scores along the run."""
    title = "Probe scores"
    if not comparisons:
        command = f"jepa probe {facts.run_dir} --task FILE"
        return section(title, missing("No probe has been run yet:", command))
    bars = "".join(_bars(comparison) for comparison in comparisons)
    curves = [_probe_curve(c) for c in comparisons if len(c.trained) > 1]
    rows = [
        (c.task, c.head, kind, point.step, percent(point.top1), _spread(point), point.num_seeds)
        for c in comparisons
        for kind, point in _points(c)
    ]
    headings = ("task", "head", "encoder", "step", "top-1", "deviation over seeds", "seeds")
    lead = (
        "Accuracy of small classifiers on frozen features. The untrained encoder went through the "
        "same probe; the dotted line is chance."
    )
    body = f"<div class=bars>{bars}</div>"
    return section(
        title, body, figures(*curves), folded("All scores", table(headings, rows, 3)), lead=lead
    )


def stage_section(facts: RunFacts) -> str:
    """What each stage was and what it took."""
    stages = facts.config.stages if facts.config else ()
    total = sum(step.report.step_seconds for step in facts.steps)
    rows = []
    for stage, group in groupby(facts.steps, key=lambda step: step.report.stage):
        reports = [step.report for step in group]
        asked = stages[stage] if stage < len(stages) else None
        seconds = sum(report.step_seconds for report in reports)
        rates = window_rates(reports)
        tokens = sum(report.tokens for report in reports)
        rows.append(
            (
                reports[0].stage_name,
                asked.frames if asked else "–",
                f"{asked.resolution} px" if asked else "–",
                number(reports[0].tokens / max(1, reports[0].clips)),
                f"{len(reports)} of {asked.steps}" if asked else len(reports),
                number(sum(report.clips for report in reports)),
                number(tokens),
                duration(rates.step_seconds if rates else None),
                number(rates.tokens_per_second if rates else None),
                percent(rates.mfu if rates else None),
                f"{max(report.peak_memory_gib for report in reports):.1f} GiB",
                percent(wait_share(reports)),
                percent(seconds / total if total else None, 0),
            )
        )
    if not rows:
        return section("Stages", missing("No step has been taken yet."))
    headings = (
        "stage", "frames", "size", "tokens a clip", "steps", "clips", "tokens", "median step",
        "tokens/s", "MFU", "peak memory", "waiting", "of step time",
    )  # fmt: skip
    return section("Stages", table(headings, rows))


def time_section(facts: RunFacts) -> str:
    """Where the time went, and how each attempt ended."""
    ledger = facts.ledger
    if ledger is None:
        return ""
    parts = list(zip(_LEDGER_COLOURS, _ledger_seconds(ledger), strict=True))
    bar = "".join(
        f'<i style="--fill:{_LEDGER_COLOURS[name]};flex:{seconds:.3f} 0 0" '
        f'title="{text(name)}: {duration(seconds)}"></i>'
        for name, seconds in parts
        if seconds > 0.002 * ledger.wall_seconds
    )
    rows: list[tuple[object, ...]] = [
        (
            Markup(f'<i class=swatch style="--fill:{_LEDGER_COLOURS[name]}"></i>{text(name)}'),
            duration(seconds),
            percent(seconds / max(ledger.wall_seconds, 1e-9)),
        )
        for name, seconds in parts
    ]
    rows.append(("Together", duration(ledger.wall_seconds), percent(1.0)))
    attempts = [
        (moment(a.begin), _steps_of(a.first_step, a.last_step), a.ending, duration(a.end - a.begin))
        for a in ledger.attempts[-_MOST_ROWS:]
    ]
    return section(
        "Time",
        f"<div class=ledger>{bar}</div>",
        table(("spent on", "time", "share"), rows),
        folded(
            f"Attempts: {len(ledger.attempts)}",
            table(("began", "steps", "ended", "lasted"), attempts, 3),
        ),
        lead="Every second from the first start to the last sign of life stands in one row.",
    )


def maps_section(facts: RunFacts, rows: Sequence[FeatureMapRow] | None, left_out: str = "") -> str:
    """Clips beside what the encoders make of them."""
    title = "Feature maps"
    if not rows:
        command = f"jepa report {facts.run_dir}"
        why = f"Left out: {left_out}" if left_out else "Left out."
        return section(title, missing(f"{why} They are drawn from the checkpoints by", command))
    lead = (
        "Each token's features, reduced to their three main directions and shown as red, green "
        "and blue. Places of one colour are alike to the encoder. Colours compare within a row, "
        "not between rows."
    )
    return section(title, *[_map_block(row) for row in rows], lead=lead)


def events_section(facts: RunFacts) -> str:
    """What happened, and which samples had to be left out."""
    rows = [
        (
            moment(event.time),
            event.name,
            _details(event.details),
            "–" if event.step is None else event.step,
        )
        for event in reversed(facts.events[-_MOST_ROWS:])
    ]
    events = (
        table(("time", "event", "details", "step"), rows, 3)
        if rows
        else missing("No event has been recorded.")
    )
    return section(
        "Events", folded(f"Events: {len(facts.events)}, newest first", events)
    ) + _faults(facts)


def config_section(facts: RunFacts) -> str:
    """The resolved configuration and the machine, folded."""
    path = facts.run_dir / CONFIG_FILE
    body = missing(f"The configuration cannot be shown: {facts.config_problem}.")
    if path.is_file():
        body = f"<pre><code>{text(path.read_text(encoding='utf-8'))}</code></pre>"
    info = f"<pre><code>{text(json.dumps(facts.info, indent=1, default=str))}</code></pre>"
    return section(
        "Configuration",
        folded("Resolved configuration", body),
        folded("Run, machines and versions", info),
    )


def _bars(comparison: Comparison) -> str:
    where = f"{comparison.task} · {comparison.head}"
    told = [f"<h3>{text(where)}</h3>"]
    for kind, point in _points(comparison):
        if kind == "trained" and point is not comparison.newest:
            continue
        name = f"step {point.step}" if kind == "trained" else "untrained"
        chance = (
            ""
            if comparison.chance is None
            else f'<div class=chance style="left:{100 * comparison.chance:.2f}%"></div>'
        )
        told.append(
            f"<div class=name>{name}</div><div class=track>"
            f'<div class="fill {kind}" style="width:{100 * point.top1:.2f}%"></div>{chance}</div>'
            f"<div class=value>{percent(point.top1)}{_spread(point, ' ± ')}</div>"
        )
    return "".join(told)


def _probe_curve(comparison: Comparison) -> str:
    points = [point for _, point in _points(comparison)]
    series = Series(
        name="top-1", steps=[p.step for p in points], values=[p.top1 for p in points], markers=True
    )
    level = None if comparison.chance is None else ("chance", comparison.chance)
    chart = Chart(
        title=f"{comparison.task} {comparison.head}",
        series=(series,),
        percent=True,
        from_zero=True,
        log_scale=False,
        level=level,
    )
    return figure(svg(chart), f"{comparison.task}, {comparison.head} probe along the run")


def _points(comparison: Comparison) -> list[tuple[str, Point]]:
    untrained = [("untrained", comparison.untrained)] if comparison.untrained else []
    return [*untrained, *(("trained", point) for point in comparison.trained)]


def _spread(point: Point, before: str = "") -> str:
    if point.num_seeds < 2:
        return "" if before else "–"
    return f"{before}{100 * point.spread:.1f}"


def _ledger_seconds(ledger: Ledger) -> tuple[float, ...]:
    return (
        ledger.training_seconds,
        ledger.data_wait_seconds,
        ledger.starting_seconds,
        ledger.saving_seconds,
        ledger.lost_seconds,
        ledger.down_seconds,
        ledger.other_seconds,
    )


def _steps_of(first: int | None, last: int | None) -> str:
    return "none" if first is None else f"{first} to {last}"


def _map_block(row: FeatureMapRow) -> str:
    edge = row.frames_THWC.shape[1]
    strip = picture(_strip(row.frames_THWC, edge), f"frames of {row.key}")
    told = [f"<div class=key>{text(row.key)}</div><div class=name>frames</div>{strip}"]
    for name, maps in row.maps.items():
        image = picture(_strip(maps, edge), f"features of {row.key}, {name}")
        told.append(f"<div class=name>{text(name)}</div>{image}")
    return f"<div class=maps>{''.join(told)}</div>"


def _strip(pictures_THWC: np.ndarray, edge: int) -> np.ndarray:
    """Pictures of successive moments side by side, `edge` pixels high, with clear gaps: RGBA."""
    nearest = np.arange(edge) * pictures_THWC.shape[1] // edge
    large_THWC = pictures_THWC[:, nearest][:, :, nearest]
    solid_THWC = np.concatenate([large_THWC, np.full_like(large_THWC[..., :1], 255)], axis=-1)
    gap_HWC = np.zeros((edge, max(1, edge // 24), 4), dtype=np.uint8)
    parts = [part for tile_HWC in solid_THWC for part in (tile_HWC, gap_HWC)]
    return np.concatenate(parts[:-1], axis=1)


def _faults(facts: RunFacts) -> str:
    title = "Samples left out"
    if not facts.faults:
        return section(title, "<p>None: every sample that was asked for could be used.</p>")
    rows = [
        (fault.get("dataset"), fault.get("key"), fault.get("reason"), fault.get("position"))
        for fault in facts.faults[-_MOST_ROWS:]
    ]
    listed = table(("dataset", "video", "reason", "position"), rows, 3)
    return section(
        title,
        folded(f"{len(facts.faults)} samples, newest last", listed),
        lead="Each was replaced by another one, the same at every restart.",
    )


def _details(details: dict[str, object]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in details.items())
