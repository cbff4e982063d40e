"""The cost model's answer as tables and sentences for a person."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from pipeline.plan.evidence import assumptions
from pipeline.plan.scaling import Layout, Scaling, StageLayout
from pipeline.plan.table import duration, hours_text, new_table, si


def render_scaling(scaling: Scaling) -> Iterator[RenderableType]:
    """The tables and sentences of a scaling, in reading order."""
    cluster = scaling.cluster
    yield (
        f"[bold]{escape(scaling.name)}[/bold] on {escape(cluster.name)}: best ZeRO stage and "
        "micro-batches for every number of GPUs"
    )
    if scaling.layouts:
        yield "\n[bold]To finish[/bold], saves, failures and restarts included"
        yield _runs(scaling)
        yield "\n[bold]A step[/bold] of each stage; bytes and cores a GPU, time between saves"
        yield _steps(scaling)
    yield from _sentences(scaling)


def _runs(scaling: Scaling) -> Table:
    table = new_table(
        "GPUs", "ZeRO", "GiB", "MFU", "efficiency", "goodput", "time", "GPU-hours", "cost"
    )
    for layout in scaling.layouts:
        table.add_row(
            f"{layout.num_gpus:,}",
            str(layout.zero_stage),
            f"{max(stage.memory_gib for stage in layout.stages):,.0f}",
            f"{layout.mfu:.1%}",
            f"{layout.efficiency:.0%}",
            f"{layout.goodput:.1%}",
            duration(layout.hours),
            hours_text(layout.gpu_hours),
            si(layout.cost),
        )
    return table


def _steps(scaling: Scaling) -> Table:
    table = new_table(
        "GPUs", "stage", "clips", "s/step", "network", "data", "bytes", "cores", "saves"
    )
    for layout in scaling.layouts:
        for number, stage in enumerate(layout.stages):
            shown = f"{layout.num_gpus:,}" if number == 0 else ""
            table.add_row(shown, escape(stage.name), *_step_cells(stage))
    return table


def _step_cells(stage: StageLayout) -> tuple[str, ...]:
    step, lost = stage.step, stage.losses
    return (
        f"{stage.accumulation} × {stage.micro_batch}",
        f"{step.seconds:,.3g}" if step.seconds < 100 else f"{step.seconds:,.0f}",
        f"{step.communication_seconds / step.seconds:.1%}",
        f"{step.data_seconds / step.seconds:.0%}",
        si(step.moved_bytes),
        f"{step.cores_per_gpu:.1f}",
        _short(lost.interval_seconds),
    )


def _short(seconds: float) -> str:
    """A time in few characters: a table of nine columns must fit a terminal of 80."""
    for unit, length in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 10.0 else f"{value:.0f} {unit}"
    return f"{seconds:.0f} s"


def _sentences(scaling: Scaling) -> Iterator[str]:
    cluster, layouts = scaling.cluster, scaling.layouts
    if len(layouts) > 1:
        cheapest = min(layouts, key=lambda one: one.gpu_hours)
        quickest = min(layouts, key=lambda one: one.hours)
        yield (
            f"\nCheapest on {_gpus(cheapest)}: {hours_text(cheapest.gpu_hours)} GPU-hours, "
            f"{duration(cheapest.hours)}. Quickest on {_gpus(quickest)}: "
            f"{duration(quickest.hours)} for {quickest.cost / max(cheapest.cost, 1e-9):.1f} times "
            "the cost."
        )
    for layout in layouts:
        if any(stage.step.data_seconds > 0 for stage in layout.stages):
            yield (
                f"[yellow]Note:[/yellow] on {_gpus(layout)} loading needs more than "
                f"{cluster.cores_per_gpu:g} cores a GPU."
            )
    if scaling.micro_batch_is_recipe and any(one.other_micro_batch for one in layouts):
        yield (
            "[yellow]Note:[/yellow] masks.truncate is min, so a micro-batch other than the "
            "configuration's cuts masks otherwise: --keep-recipe keeps micro-batches and ZeRO "
            "stage."
        )
    for one in scaling.impossible:
        yield f"[yellow]Note:[/yellow] {one.num_gpus:,} GPUs: {escape(one.reason)}."
    if layouts:
        for words in assumptions(cluster.best_efficiency, cluster.overlap):
            yield f"\n[dim]{escape(words)}[/dim]"


def _gpus(layout: Layout) -> str:
    return "1 GPU" if layout.num_gpus == 1 else f"{layout.num_gpus:,} GPUs"
