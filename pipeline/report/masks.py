"""What masks leave of a clip at each of its times, under the run's rule and under the others."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pipeline.masks.blocks import Truncate
from pipeline.masks.kept import KeptTokens, expected_kept
from pipeline.report.charts import Chart, Series, svg
from pipeline.report.html import figure, figures, section, table, text
from pipeline.report.style import CSS
from pipeline.run import RunConfig
from pipeline.stages import Stage

_TITLE = "What masks keep, over a clip's time"
_LEAD = (
    "Share of a frame's positions that the student sees as context, by time step of the clip. The "
    "rule min, the reference's, cuts every clip of a micro-batch to "
    "the shortest and keeps the earliest tokens, so that little is left of the end; fixed drops "
    "tokens at random whatever their time; none drops nothing. Change it with masks.truncate."
)
# Means good to some per cent; a report must not take long.
_MICRO_BATCHES = 24

_Kept = dict[Truncate, tuple[KeptTokens, ...]]


def masks_section(config: RunConfig | None) -> str:
    """Curves of every stage and mask, and the means as a table."""
    if config is None or not config.masks.blocks:
        return ""
    drawn: list[str] = []
    rows: list[tuple[object, ...]] = []
    for stage in config.stages:
        kept = _kept_by_rule(config, stage)
        drawn += _figures(config, stage, kept)
        rows += _rows(config, stage, kept)
    headings = ("Stage", "Mask", "Rule", "Context", "Target", "Context in the last quarter")
    return section(_TITLE, figures(*drawn), table(headings, rows, words=3), lead=_LEAD)


def write_masks_page(config: RunConfig, path: Path) -> None:
    """The section as a page of its own, for a run that has not begun.

    Raises:
        OSError: It cannot be written.
    """
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{text(config.name)} · masks</title><style>{CSS}</style></head>"
        f"<body><main><h1>{text(config.name)}</h1>{masks_section(config)}</main></body></html>\n"
    )
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _kept_by_rule(config: RunConfig, stage: Stage) -> _Kept:
    grid, masks = config.grid(stage.frames, stage.resolution), config.masks_of(stage)
    rules: tuple[Truncate, ...] = get_args(Truncate)
    return {
        rule: expected_kept(
            masks.model_copy(update={"truncate": rule}), grid, stage.micro_batch, _MICRO_BATCHES
        )
        for rule in rules
    }


def _figures(config: RunConfig, stage: Stage, kept: _Kept) -> Iterator[str]:
    """Context by time for every mask; targets follow the same way and stand in the table."""
    grid, used = config.grid(stage.frames, stage.resolution), config.masks_of(stage).truncate
    for number in range(len(kept[used])):
        series = tuple(
            Series(
                name=f"{rule} (this run)" if rule == used else rule,
                steps=range(1, grid.t + 1),
                values=[tokens / (grid.h * grid.w) for tokens in masks[number].context_T],
                markers=True,
            )
            for rule, masks in kept.items()
        )
        chart = Chart(
            title=f"{stage.name}, mask {number + 1}",
            series=series,
            log_scale=False,
            percent=True,
            from_zero=True,
            along="time step of the clip",
        )
        yield figure(svg(chart), f"Stage {stage.name}, mask {number + 1}: context by time")


def _rows(config: RunConfig, stage: Stage, kept: _Kept) -> Iterator[tuple[object, ...]]:
    num_tokens = config.grid(stage.frames, stage.resolution).num_tokens
    used = config.masks_of(stage).truncate
    for number in range(len(kept[used])):
        for rule, masks in kept.items():
            mask = masks[number]
            late = mask.context_T[-max(1, len(mask.context_T) // 4) :]
            yield (
                stage.name,
                number + 1,
                f"{rule}, this run" if rule == used else rule,
                f"{mask.context:,.0f} ({mask.context / num_tokens:.0%})",
                f"{mask.target:,.0f} ({mask.target / num_tokens:.0%})",
                f"{sum(late) / mask.context:.0%} of it",
            )
