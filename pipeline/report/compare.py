"""Runs side by side: how they stand, what differs in their settings, stages, scores and curves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from pipeline.clip import StepReport
from pipeline.config.report import ABSENT, changes
from pipeline.report.charts import Chart, Series, svg
from pipeline.report.facts import RunFacts
from pipeline.report.html import duration, figure, figures, missing, number, percent, section, table
from pipeline.report.html import text as escaped
from pipeline.report.probes import Comparison, compare
from pipeline.report.style import CSS

MOST_RUNS = 8
_ABSENT = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing and its value in every run, in their order."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of one kind."""

    title: str
    rows: tuple[Row, ...]
    lead: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SideBySide:
    """Everything that is compared."""

    names: tuple[str, ...]
    standing: Table
    stages: Table
    scores: Table
    settings: Table

    @property
    def tables(self) -> tuple[Table, ...]:
        """In the order of interest."""
        return (self.standing, self.scores, self.stages, self.settings)

    def document(self) -> dict[str, Any]:
        """Plain data: table → row → run → value."""
        return {
            "runs": list(self.names),
            **{
                table.title: {
                    row.name: dict(zip(self.names, row.values, strict=True)) for row in table.rows
                }
                for table in self.tables
            },
        }


def side_by_side(runs: Sequence[RunFacts]) -> SideBySide:
    """Compares runs, two or more."""
    return SideBySide(
        names=_names(runs),
        standing=Table(title="standing", rows=tuple(_standing(runs))),
        stages=Table(title="stages", rows=tuple(_stages(runs))),
        scores=Table(
            title="scores",
            rows=tuple(_scores(runs)),
            lead="Top-1 of small classifiers on frozen features.",
        ),
        settings=Table(
            title="settings",
            rows=tuple(_settings(runs)),
            lead="Keys of the resolved configurations that are not the same in all runs.",
        ),
    )


def render_comparison(runs: Sequence[RunFacts], found: SideBySide) -> str:
    """The comparison as one HTML page that needs no other."""
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    title = " · ".join(found.names)
    body = (
        f"<p class=eyebrow>Training runs side by side</p><h1>{escaped(title)}</h1>",
        _section(found, found.standing),
        _section(found, found.scores),
        _curves(runs, found.names),
        _section(found, found.stages),
        _section(found, found.settings),
        f"<footer>Written {written} by jepa compare.</footer>",
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)} · jepa</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _names(runs: Sequence[RunFacts]) -> tuple[str, ...]:
    """Names of folders; with the folder above where two are alike."""
    names = [facts.run_dir.resolve().name for facts in runs]
    return tuple(
        name if names.count(name) == 1 else f"{facts.run_dir.resolve().parent.name}/{name}"
        for name, facts in zip(names, runs, strict=True)
    )


def _standing(runs: Sequence[RunFacts]) -> list[Row]:
    return [
        _row(runs, "state", lambda f: f.state),
        _row(runs, "step", lambda f: f"{f.last_step} of {f.num_steps or '?'}"),
        _row(runs, "health", lambda f: f.verdict.state),
        _row(runs, "step to keep", lambda f: _or(f.verdict.keep.step)),
        _row(runs, "why", lambda f: "; ".join(f.verdict.keep.reasons)),
        _row(runs, "clips seen", lambda f: number(sum(s.report.clips for s in f.steps))),
        _row(runs, "tokens seen", lambda f: number(sum(s.report.tokens for s in f.steps))),
        _row(runs, "FLOPs", lambda f: number(sum(s.report.flops for s in f.steps))),
        _row(runs, "loss", lambda f: number(f.steps[-1].report.loss if f.steps else None)),
        _row(runs, "effective rank", lambda f: number(_last_signal(f, "effective_rank"))),
        _row(runs, "spread", lambda f: number(_last_signal(f, "feature_std"))),
        _row(runs, "clips per second", lambda f: number(f.rates and f.rates.clips_per_second)),
        _row(runs, "waiting for data", lambda f: percent(f.rates and f.rates.wait_share)),
        _row(runs, "wall time", lambda f: duration(f.ledger and f.ledger.wall_seconds)),
        _row(runs, "of it computing", lambda f: percent(f.ledger and f.ledger.effective_share, 0)),
        _row(runs, "starts", lambda f: str(len(f.ledger.attempts) if f.ledger else 0)),
        _row(runs, "ranks", lambda f: str(f.info.get("world_size", _ABSENT))),
    ]


def _stages(runs: Sequence[RunFacts]) -> list[Row]:
    """What was done in each stage, by its place among the stages."""
    rows: list[Row] = []
    columns = [_stage_words(facts) for facts in runs]
    for place in range(max((len(column) for column in columns), default=0)):
        values = tuple(column[place] if place < len(column) else _ABSENT for column in columns)
        rows.append(Row(name=f"stage {place + 1}", values=values))
    return rows


def _stage_words(facts: RunFacts) -> list[str]:
    words = []
    for stage, group in groupby(facts.steps, key=lambda step: step.report.stage):
        reports = [step.report for step in group]
        asked = facts.config.stages[stage] if facts.config else None
        size = f", {asked.frames} frames at {asked.resolution} px" if asked else ""
        steps = f"{len(reports)}" + (f" of {asked.steps}" if asked else "")
        losses = f"loss {number(reports[0].loss)} to {number(reports[-1].loss)}"
        words.append(f"{reports[0].stage_name}: {steps} steps{size}, {losses}")
    return words


def _scores(runs: Sequence[RunFacts]) -> list[Row]:
    found = [{(c.task, c.head): c for c in compare(facts.probes)} for facts in runs]
    keys = list(dict.fromkeys(key for one in found for key in one))
    told: tuple[tuple[str, Callable[[Comparison], str]], ...] = (
        ("untrained", lambda c: percent(c.untrained.top1 if c.untrained else None)),
        ("best", _best),
        ("newest", lambda c: _point(c.newest.top1, c.newest.step) if c.newest else _ABSENT),
    )
    return [
        Row(
            name=f"{task} {head}, {kind}",
            values=tuple(say(one[task, head]) if (task, head) in one else _ABSENT for one in found),
        )
        for task, head in keys
        for kind, say in told
    ]


def _best(comparison: Comparison) -> str:
    best = max(comparison.trained, key=lambda point: point.top1, default=None)
    return _ABSENT if best is None else _point(best.top1, best.step)


def _point(top1: float, step: int) -> str:
    return f"{percent(top1)} at step {step}"


def _settings(runs: Sequence[RunFacts]) -> list[Row]:
    """Keys that differ from the first run's in any other."""
    first = runs[0].config
    if first is None or any(facts.config is None for facts in runs):
        return [_row(runs, "configuration", lambda f: f.config_problem or "can be read")]
    differing = [
        {} if facts.config is None else {one.key: one for one in changes(first, facts.config)}
        for facts in runs
    ]
    rows = []
    for key in dict.fromkeys(key for one in differing for key in one):
        left = next(one[key].left for one in differing if key in one)
        values = tuple(one[key].right if key in one else left for one in differing)
        shown = tuple(_ABSENT if value == ABSENT else value for value in values)
        rows.append(Row(name=key, values=shown))
    return rows


def _curves(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    if not any(facts.steps for facts in runs):
        return section("Curves", missing("No step has been taken yet."))
    drawn = [
        figure(svg(_chart(runs, names, "Loss", lambda r: r.loss, wide=True)), "Loss", wide=True),
        *(
            figure(svg(chart), chart.title)
            for chart in (
                _chart(runs, names, "Effective rank (RankMe)", _signal("effective_rank")),
                _chart(runs, names, "Spread of the features", _signal("feature_std")),
                _chart(runs, names, "Gradient norm", lambda r: r.gradient_norm),
                _chart(runs, names, "Learning rate", lambda r: r.learning_rate),
                _chart(
                    runs, names, "Clips per second", lambda r: r.clips / max(r.step_seconds, 1e-9)
                ),
            )
            if chart.series
        ),
        *(figure(svg(chart), chart.title) for chart in _probe_charts(runs, names)),
    ]
    lead = "Losses of different masks, stages or teachers do not compare; probe scores do."
    return section("Curves", figures(*drawn), lead=lead)


def _chart(
    runs: Sequence[RunFacts],
    names: Sequence[str],
    title: str,
    value: Callable[[StepReport], float | None],
    *,
    wide: bool = False,
) -> Chart:
    series = []
    for facts, name in zip(runs, names, strict=True):
        points = [(s.report.step, value(s.report)) for s in facts.steps]
        known = [(step, found) for step, found in points if found is not None]
        if known:
            steps, values = zip(*known, strict=True)
            smooth = len(known) == len(points)
            series.append(Series(name=name, steps=steps, values=values, smooth=smooth))
    return Chart(title=title, series=tuple(series), wide=wide)


def _probe_charts(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Chart]:
    series: dict[str, list[Series]] = {}
    for facts, name in zip(runs, names, strict=True):
        for one in compare(facts.probes):
            points = [*([one.untrained] if one.untrained else []), *one.trained]
            steps, values = [point.step for point in points], [point.top1 for point in points]
            line = Series(name=name, steps=steps, values=values, markers=True)
            series.setdefault(f"{one.task}, {one.head} probe", []).append(line)
    return [
        Chart(title=title, series=tuple(lines), percent=True, from_zero=True, log_scale=False)
        for title, lines in series.items()
    ]


def _section(found: SideBySide, one: Table) -> str:
    title = one.title.capitalize()
    if not one.rows:
        nothing = "No probe has been run." if one is found.scores else "No difference."
        return section(title, missing(nothing))
    rows = [(row.name, *row.values) for row in one.rows]
    words = len(found.names) + 1
    return section(title, table(("", *found.names), rows, min(words, 4)), lead=one.lead)


def _row(runs: Sequence[RunFacts], name: str, say: Callable[[RunFacts], str]) -> Row:
    return Row(name=name, values=tuple(say(facts) for facts in runs))


def _signal(name: str) -> Callable[[StepReport], float | None]:
    return lambda report: (report.health or {}).get(name)


def _last_signal(facts: RunFacts, name: str) -> float | None:
    value = _signal(name)
    found = (value(step.report) for step in reversed(facts.steps))
    return next((one for one in found if one is not None), None)


def _or(value: int | None) -> str:
    return _ABSENT if value is None else str(value)
