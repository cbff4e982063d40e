"""`jepa ckpt ls` and `jepa ckpt verify`."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import commit_of_step, verify
from pipeline.commands import JsonFlag, print_json
from pipeline.errors import CheckpointError, ExitCode, UsageError


def ls(run: Path, *, json: JsonFlag = False) -> None:
    """List a run's checkpoints, and saves that were cut short.

    Args:
        run: Folder of the run.
        json: Print the list as JSON.
    """
    _must_be_run(run)
    rows = [_row(commit) for commit in layout.list_commits(run)]
    partials = [path.name for path in layout.list_partials(run)]
    aside = [path.name for path in sorted(layout.checkpoints_dir(run).glob("aside-*"))]
    if json:
        print_json({"checkpoints": rows, "cut_short": partials, "aside": aside})
        return
    table = Table(box=None, header_style="bold")
    for heading in ("step", "saved (UTC)", "ranks", "files", "MiB", "folder"):
        table.add_column(
            heading, justify="left" if heading in ("saved (UTC)", "folder") else "right"
        )
    for row in rows:
        mib = f"{row['bytes'] / 2**20:.1f}"
        table.add_row(
            str(row["step"]),
            row["created"],
            str(row["world_size"]),
            str(row["files"]),
            mib,
            row["path"],
        )
    console = Console()
    console.print(table if rows else f"{run} has no checkpoint yet.")
    for name in partials:
        console.print(
            f"{name}: a save that was cut short; it is ignored and goes at the next resume."
        )
    for name in aside:
        console.print(f"{name}: set aside when the run went on from an older step.")


def verify_(run: Path, *, step: int | None = None, json: JsonFlag = False) -> ExitCode:
    """Compare every byte of a run's checkpoints with their digests.

    Args:
        run: Folder of the run.
        step: Only the checkpoint of this step.
        json: Print the findings as JSON.
    """
    _must_be_run(run)
    commits = layout.list_commits(run) if step is None else [commit_of_step(run, step)]
    if not commits:
        raise CheckpointError(f"{run} has no checkpoint.", remedy="Is it the right folder?")
    console = Console(quiet=json)
    findings: dict[int, list[str]] = {}
    for commit in commits:
        with console.status(f"step {commit.step}"):
            findings[commit.step] = verify(commit.path)
        problems = findings[commit.step]
        words = "[red]damaged[/red]" if problems else "[green]whole[/green]"
        console.print(f"step {commit.step}: {words}")
        for problem in problems:
            console.print(f"  {problem}", markup=False)
    if json:
        print_json([{"step": s, "problems": found} for s, found in findings.items()])
    # 78: a person has to look; trying again does not mend a file.
    return ExitCode.CONFIG if any(findings.values()) else ExitCode.DONE


def _row(commit: layout.Commit) -> dict[str, Any]:
    try:
        manifest = layout.read_manifest(commit.path)
    except CheckpointError:
        missing = {"created": "damaged", "world_size": "?", "files": 0, "bytes": 0}
        return {"step": commit.step, **missing, "path": str(commit.path)}
    return {
        "step": commit.step,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "files": len(manifest.files),
        "bytes": sum(entry.num_bytes for entry in manifest.files),
        "path": str(commit.path),
    }


def _must_be_run(run: Path) -> None:
    if not layout.checkpoints_dir(run).is_dir():
        near = sorted(path.parent.name for path in run.parent.glob("*/checkpoints"))
        there = f" Runs beside it: {', '.join(near)}." if near else ""
        raise UsageError(f"{run} is not the folder of a run: it has no checkpoints.{there}")
