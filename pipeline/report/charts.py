"""Charts as inline SVG whose colours follow the page, and pictures; the importer of matplotlib."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn colours stand for CSS variables, so that a chart is right on light and on dark paper.
_INK, _SOFT, _GRID, _BAND = "#000001", "#000002", "#000003", "#000004"
_SERIES = ("#000011", "#000012", "#000013", "#000014")
_VARIABLES = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _GRID: "var(--line)",
    _BAND: "var(--band)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(_SERIES, start=1)},
}
_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), "-.")
# More points than pixels say nothing and weigh megabytes.
_MAX_POINTS = 400
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.0,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "axes.linewidth": 0.6,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a chart; told from others by its dashes as well as by its colour."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    smooth: bool = False
    """Show a running median over the faint values themselves."""
    markers: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A stage on the axis of steps."""

    name: str
    first_step: int
    last_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """What is drawn, and what it means in words for those who cannot see it."""

    title: str
    series: tuple[Series, ...]
    spans: tuple[Span, ...] = ()
    wide: bool = False
    log_scale: bool | None = None
    """None decides by the range of the values."""
    percent: bool = False
    from_zero: bool = False
    level: tuple[str, float] | None = None
    """A labelled horizontal line, such as chance."""
    along: str = "step"
    """What the horizontal axis counts."""


def svg(chart: Chart) -> str:
    """Draws a chart as an `<svg>` element without ids that could clash with another's."""
    size = (8.4, 2.7) if chart.wide else (4.2, 2.2)
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, chart)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), chart)


def picture(pixels_HWC: np.ndarray, alternative: str) -> str:
    """uint8 RGB or RGBA pixels as an `<img>` that holds its own data."""
    content = io.BytesIO()
    matplotlib.image.imsave(content, pixels_HWC, format="png")
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


def _draw(axes: Axes, chart: Chart) -> None:
    for number, series in enumerate(chart.series):
        _draw_series(axes, series, number)
    _scale(axes, chart)
    _draw_spans(axes, chart)
    if chart.level is not None:
        name, value = chart.level
        axes.axhline(value, color=_SOFT, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(
            name, (1.0, value), xycoords=("axes fraction", "data"), xytext=(-2, 2),
            textcoords="offset points", ha="right", va="bottom", color=_SOFT, fontsize=7,
        )  # fmt: skip
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=7, loc="best", handlelength=2.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.along, fontsize=7)
    axes.tick_params(length=2.5, width=0.6)


def _draw_series(axes: Axes, series: Series, number: int) -> None:
    steps, values = np.asarray(series.steps, float), np.asarray(series.values, float)
    finite = np.isfinite(values)
    steps, values = _thin(steps[finite], values[finite])
    # From the fifth line on the colours come again, with other dashes.
    dashes = _LINES[(number + number // len(_SERIES)) % len(_LINES)]
    colour = _SERIES[number % len(_SERIES)]
    if series.smooth and len(values) > 20:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
        values = _running_median(values, max(3, len(values) // 40))
    marker = "o" if series.markers or len(values) < 3 else None
    axes.plot(
        steps, values, color=colour, linewidth=1.4, linestyle=dashes, marker=marker,
        markersize=3, label=series.name,
    )  # fmt: skip


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians of equal runs of points, few enough to draw."""
    if len(values) <= _MAX_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(values)), _MAX_POINTS)
    thin_steps = np.array([steps[part].mean() for part in parts])
    return thin_steps, np.array([np.median(values[part]) for part in parts])


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    half = width // 2
    return np.array(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def _scale(axes: Axes, chart: Chart) -> None:
    parts = [np.asarray(s.values, float) for s in chart.series]
    values = np.concatenate([part[np.isfinite(part)] for part in parts]) if parts else np.zeros(0)
    positive = len(values) > 0 and values.min() > 0
    wanted = chart.log_scale
    if wanted is None:
        wanted = positive and values.max() > 20 * values.min()
    if wanted and positive:
        axes.set_yscale("log")
    elif chart.from_zero:
        axes.set_ylim(0, max(1.1 * float(values.max(initial=0.0)), 1e-9))
    elif len(values) and np.ptp(values) <= 1e-3 * abs(values.max()):
        # A constant: rounding must not look like movement.
        margin = 0.1 * abs(float(values.max())) or 1.0
        axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
    if chart.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _draw_spans(axes: Axes, chart: Chart) -> None:
    """Shades every other stage and names all of them above the plot."""
    if not chart.spans:
        return
    first, last = chart.spans[0].first_step, chart.spans[-1].last_step
    axes.set_xlim(first - 0.5, max(last, first + 1) + 0.5)
    for number, span in enumerate(chart.spans):
        left, right = span.first_step - 0.5, span.last_step + 0.5
        if number % 2:
            axes.axvspan(left, right, color=_BAND, linewidth=0, zorder=0)
        # About so many characters fit over the span.
        room = int((right - left) / (last - first + 1) * (110 if chart.wide else 48))
        name = span.name if len(span.name) <= room else f"{span.name[: max(0, room - 1)]}…"
        if room >= 4:
            axes.annotate(
                name, ((left + right) / 2, 1.0), xycoords=("data", "axes fraction"),
                xytext=(0, 3), textcoords="offset points", ha="center", va="bottom",
                color=_SOFT, fontsize=7,
            )  # fmt: skip


def _inline(text: str, chart: Chart) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids of groups serve nobody and repeat in every chart; those of paths are salted by the title.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    names = ", ".join(series.name for series in chart.series)
    label = f"{chart.title}: {names}"
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()
