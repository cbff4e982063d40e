"""The sections that are curves over steps: loss, features, schedules, speed."""

from collections.abc import Callable
from itertools import groupby

from pipeline.clip import StepReport
from pipeline.report.charts import Chart, Series, Span, svg
from pipeline.report.facts import RunFacts
from pipeline.report.html import figure, figures, missing, section

Value = Callable[[StepReport], float]

# What each collapse signal is called, and how to read it.
_SIGNALS = {
    "effective_rank": "Effective rank of the features (RankMe): should not fall to 1",
    "feature_std": "Spread of the features: 0 is collapse",
    "clip_cosine": "Likeness of different clips (cosine): 1 is collapse",
    "between_clip_share": "Share of variance between clips: 0 means position only",
    "sigreg_gauge": "Distance from a unit Gaussian (SIGReg / N): 0.40 is collapse to zero",
}


def loss_section(facts: RunFacts) -> str:
    """The loss over all stages, and its parts."""
    title = "Loss"
    if not facts.steps:
        return section(title, missing("No step has been taken yet."))
    spans = stage_spans(facts)
    whole = Chart(
        title="Loss",
        series=(_series(facts, "loss", lambda r: r.loss, smooth=True),),
        spans=spans,
        wide=True,
    )
    names = list(dict.fromkeys(name for step in facts.steps for name in step.report.terms))
    parts = tuple(_series(facts, name, _term(name), smooth=True) for name in names[:4])
    drawn = [figure(svg(whole), "Loss, with its running median; shading marks stages", wide=True)]
    if len(parts) > 1:
        chart = Chart(title="Loss terms", series=parts, spans=spans)
        drawn.append(figure(svg(chart), "Terms of the loss"))
    norm = Chart(
        title="Gradient norm",
        series=(_series(facts, "norm", lambda r: r.gradient_norm, smooth=True),),
        spans=spans,
    )
    drawn.append(figure(svg(norm), "Gradient norm"))
    lead = (
        "The target of this loss moves with the teacher, so it is only a proxy: a falling loss "
        "proves nothing, and a rising one can go with better features. Look at the feature rank "
        "and the probes."
    )
    return section(title, figures(*drawn), lead=lead)


def features_section(facts: RunFacts) -> str:
    """Collapse signals over steps."""
    title = "Health of the features"
    measured = [step for step in facts.steps if step.report.health]
    if not measured:
        told = "No features have been measured; lower track.health_every_steps in the config."
        return section(title, missing(told))
    steps = [step.report.step for step in measured]
    drawn: list[str] = []
    for name, caption in _SIGNALS.items():
        values = [(step.report.health or {}).get(name, float("nan")) for step in measured]
        if any(value == value for value in values):  # noqa: PLR0124 - only NaN differs from itself
            series = Series(name=name, steps=steps, values=values, markers=len(steps) < 60)
            chart = Chart(
                title=name,
                series=(series,),
                spans=stage_spans(facts),
                from_zero=name != "clip_cosine",
                log_scale=False,
            )
            drawn.append(figure(svg(chart), caption))
    lead = (
        "Measured on the targets that the teacher gives, over some clips of a batch. Compare "
        "within a stage: larger clips, or another number of them, move these curves too."
    )
    return section(title, figures(*drawn), lead=lead)


def schedule_section(facts: RunFacts) -> str:
    """What the schedules asked for at each step."""
    if not facts.steps:
        return ""
    wanted: dict[str, Value] = {
        "Learning rate": lambda r: r.learning_rate,
        "Weight decay": lambda r: r.weight_decay,
        # A step whose update was left out moves no teacher.
        "Teacher momentum": lambda r: float("nan") if r.skipped else r.momentum,
    }
    drawn = []
    for name, value in wanted.items():
        chart = Chart(
            title=name,
            series=(_series(facts, name, value),),
            spans=stage_spans(facts),
            log_scale=False,
        )
        drawn.append(figure(svg(chart), name))
    return section("Schedules", figures(*drawn))


def speed_section(facts: RunFacts) -> str:
    """Throughput, waiting and memory."""
    if not facts.steps:
        return ""
    wanted: dict[str, tuple[Value, bool]] = {
        "Clips per second": (lambda r: r.clips / max(r.step_seconds, 1e-9), False),
        "Tokens per second": (lambda r: r.tokens / max(r.step_seconds, 1e-9), False),
        "Share of the step spent waiting for data": (
            lambda r: min(1.0, r.data_wait_seconds / max(r.step_seconds, 1e-9)),
            True,
        ),
        "Peak memory of rank 0, GiB": (lambda r: r.peak_memory_gib, False),
    }
    drawn = []
    for name, (value, is_share) in wanted.items():
        chart = Chart(
            title=name,
            series=(_series(facts, name, value, smooth=True),),
            spans=stage_spans(facts),
            percent=is_share,
            from_zero=True,
            log_scale=False,
        )
        drawn.append(figure(svg(chart), name))
    return section("Speed", figures(*drawn))


def stage_spans(facts: RunFacts) -> tuple[Span, ...]:
    """The stages that have been reached, cut at the last step."""
    spans = []
    for _, group in groupby(facts.steps, key=lambda step: step.report.stage):
        steps = list(group)
        first, last = steps[0].report, steps[-1].report
        spans.append(Span(name=first.stage_name, first_step=first.step, last_step=last.step))
    return tuple(spans)


def _series(facts: RunFacts, name: str, value: Value, *, smooth: bool = False) -> Series:
    reports = [step.report for step in facts.steps]
    return Series(
        name=name,
        steps=[report.step for report in reports],
        values=[value(report) for report in reports],
        smooth=smooth,
    )


def _term(name: str) -> Value:
    return lambda report: report.terms.get(name, float("nan"))
