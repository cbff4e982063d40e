"""A preflight's findings as a table for a person."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from launch.preflight.finding import Finding

_SHOWN = {
    "ok": "[green]ok[/green]",
    "warn": "[yellow]warn[/yellow]",
    "fail": "[red]FAIL[/red]",
    "skip": "[dim]–[/dim]",
}


def render(findings: Sequence[Finding], seconds: float) -> RenderableType:
    """The table, what to do about what is wrong, and one sentence."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("check", "", "expected", "found"):
        table.add_column(heading, overflow="fold")
    table.add_column("s", justify="right")
    for one in findings:
        took = f"{one.seconds:.1f}" if one.seconds >= 0.05 else ""
        table.add_row(one.name, _SHOWN[one.state], escape(one.expected), escape(one.got), took)
    wrong = [one for one in findings if one.state in ("fail", "warn")]
    remedies = [f"[bold]{one.name}[/bold]{_blamed(one)}: {escape(one.remedy)}" for one in wrong]
    return Group(table, *remedies, _sentence(findings, seconds))


def _blamed(one: Finding) -> str:
    return f" ({escape(', '.join(one.nodes))})" if one.nodes else ""


def _sentence(findings: Sequence[Finding], seconds: float) -> str:
    failed = [one.name for one in findings if one.state == "fail"]
    warned = sum(one.state == "warn" for one in findings)
    if failed:
        return f"\n[red]Not ready[/red]: {', '.join(failed)}. Checked in {seconds:.1f} s."
    more = f", {warned} warning(s)" if warned else ""
    return f"\n[green]Ready[/green]{more}. Checked in {seconds:.1f} s."
