"""A plan as tables and sentences for a person."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from pipeline.plan.estimate import RunPlan, StagePlan
from pipeline.plan.evidence import UTILISATIONS

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_MINUTES_PER_DAY = 24 * 60
_CHECKPOINTING = {True: "on", False: "off", "auto": "chosen for each stage"}


def render(plan: RunPlan) -> Iterator[RenderableType]:
    """The tables and sentences of a plan, in reading order."""
    yield (
        f"[bold]{escape(plan.name)}[/bold]: encoder with {si(plan.encoder_params)} parameters, "
        f"predictor with {si(plan.predictor_params)}; {plan.global_batch} clips per step"
    )
    yield "\n[bold]Clips[/bold]"
    yield _clips(plan)
    yield "\n[bold]Tokens kept per clip and mask[/bold], mean"
    yield _masks(plan)
    yield "\n[bold]Compute[/bold], model FLOPs forward and backward"
    yield _compute(plan)
    yield (
        f"\n[bold]Memory per GPU[/bold] in GiB, estimated: {_gpus(plan.machine.num_gpus)}, "
        f"ZeRO-{plan.zero_stage}; activations kept, or recomputed by activation checkpointing, "
        f"which is {_CHECKPOINTING[plan.activation_checkpointing]}"
    )
    yield _memory(plan)
    machine = plan.machine
    yield (
        f"\n{_gpus(machine.num_gpus)} at {machine.utilisation:.0%} of {machine.peak_tflops:g} "
        f"TFLOP/s each: {duration(plan.wall_hours)}, {hours_text(plan.gpu_hours)} GPU-hours. "
        f"That share is assumed: {UTILISATIONS}. --utilisation sets it, --cluster reckons it."
    )
    yield (
        f"Every step at the size of the last stage, {escape(plan.stages[-1].name)}, would take "
        f"{plan.ratio_to_last_size:.1f} times that by FLOPs: "
        f"{hours_text(plan.gpu_hours_at_last_size)} GPU-hours. GPUs are often busier with long "
        "clips than with short ones: `jepa bench stages` measures it."
    )
    for warning in plan.warnings:
        yield f"[yellow]Note:[/yellow] {escape(warning)}"


def si(value: float) -> str:
    """Three significant digits with an SI prefix: 1234567 is 1.23M."""
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000.0, power + 1
    return f"{value:.3g}{_PREFIXES[power]}"


def duration(hours: float) -> str:
    """Days and hours, hours and minutes, or minutes."""
    minutes = round(hours * 60)
    if minutes < 1:
        return "less than a minute"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < _MINUTES_PER_DAY:
        return f"{minutes // 60} h {minutes % 60} min"
    whole_hours = round(minutes / 60)
    return f"{whole_hours // 24} d {whole_hours % 24} h"


def _clips(plan: RunPlan) -> Table:
    table = new_table("stage", "steps", "frames", "fps", "pixels", "tokens/clip", "clips", "tokens")
    for stage in plan.stages:
        table.add_row(
            escape(stage.name),
            f"{stage.steps:,}",
            str(stage.frames),
            f"{stage.fps:g}",
            f"{stage.resolution}²",
            f"{stage.tokens_per_clip:,}",
            si(stage.clips),
            si(stage.tokens),
        )
    table.add_section()
    table.add_row("total", f"{plan.steps:,}", "", "", "", "", si(plan.clips), si(plan.tokens))
    return table


def _masks(plan: RunPlan) -> Table:
    table = new_table("stage", "mask", "context", "share", "target", "share")
    for stage in plan.stages:
        for number, mask in enumerate(stage.masks):
            table.add_row(
                escape(stage.name) if number == 0 else "",
                str(number),
                f"{mask.context_mean:,.0f}",
                f"{mask.context_mean / stage.tokens_per_clip:.0%}",
                f"{mask.target_mean:,.0f}",
                f"{mask.target_mean / stage.tokens_per_clip:.0%}",
            )
    return table


def _compute(plan: RunPlan) -> Table:
    table = new_table("stage", "FLOP/clip", "FLOP", "share", "GPU-hours", "time")
    for stage in plan.stages:
        table.add_row(
            escape(stage.name),
            si(stage.flops_per_clip),
            si(stage.flops),
            f"{stage.flops / plan.flops:.0%}",
            hours_text(stage.gpu_hours),
            duration(stage.wall_hours),
        )
    table.add_section()
    total = (hours_text(plan.gpu_hours), duration(plan.wall_hours))
    table.add_row("total", "", si(plan.flops), "100%", *total)
    return table


def _memory(plan: RunPlan) -> Table:
    table = new_table(
        "stage", "clips", "repeats", "states", "buffers", "kept", "recomputed", "total"
    )
    for stage in plan.stages:
        table.add_row(escape(stage.name), *_memory_cells(stage))
    return table


def _memory_cells(stage: StagePlan) -> tuple[str, ...]:
    memory = stage.memory
    values = (
        memory.states_gib,
        memory.buffers_gib,
        memory.activations_gib,
        memory.checkpointed_activations_gib,
        memory.total_gib,
    )
    counts = (str(stage.micro_batch), str(stage.accumulation))
    return (*counts, *(f"{value:,.1f}" if value >= 0.1 else f"{value:.3f}" for value in values))


def new_table(first: str, *others: str) -> Table:
    """A plain table whose columns but the first are numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def hours_text(value: float) -> str:
    """Hours with as many digits as mean something."""
    if value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count:,} GPUs"
