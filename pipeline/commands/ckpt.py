"""`jepa ckpt ls`, `verify`, `prune`, `pin` and `cat`."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from pipeline.checkpoint import layout, retain
from pipeline.checkpoint.inspect import tensor_facts, tensor_problems, tensor_shapes
from pipeline.checkpoint.layout import CheckpointConfig, Commit
from pipeline.checkpoint.load import commit_of_step, find_commit, read_state, verify
from pipeline.commands import JsonFlag, print_json
from pipeline.config.load import load_config
from pipeline.errors import CheckpointError, ExitCode, JepaError, UsageError
from pipeline.report.html import duration
from pipeline.run import RunConfig
from pipeline.stages import place_of_step
from pipeline.track.folder import CONFIG_FILE, RUN_FILE, read_json_object

_HEADINGS = ("step", "stage", "MiB", "age", "ranks", "state", "folder")
_LEFT = ("stage", "state", "folder")


def ls(run: Path, *, json: JsonFlag = False) -> None:
    """List a run's checkpoints, and saves that were cut short.

    Compares names and sizes of files with the manifest; `jepa ckpt verify` reads every byte.

    Args:
        run: Folder of the run.
        json: Print the list as JSON.
    """
    _must_be_run(run)
    rows = [_row(run, commit) for commit in _all_commits(run)]
    partials = [path.name for path in layout.list_partials(run)]
    aside = [path.name for path in _aside(run)]
    if json:
        print_json({"checkpoints": rows, "cut_short": partials, "aside": aside})
        return
    table = Table(box=None, header_style="bold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _LEFT else "right")
    for row in rows:
        table.add_row(*_cells(row))
    console = Console()
    console.print(table if rows else f"{run} has no checkpoint yet.")
    for row in rows:
        for problem in row["problems"]:
            console.print(f"step {row['step']}: {problem}", markup=False, soft_wrap=True)
    for name in partials:
        console.print(
            f"{name}: a save that was cut short; it is ignored and goes at the next resume."
        )
    for name in aside:
        console.print(f"{name}: set aside when the run went on from an older step.")


def verify_(
    run: Path, *, step: int | None = None, all: bool = False, json: JsonFlag = False
) -> ExitCode:
    """Compare every byte of a run's checkpoints with their digests, every tensor with its print.

    Args:
        run: Folder of the run.
        step: Only the checkpoint of this step.
        all: Also those that were set aside.
        json: Print the findings as JSON.
    """
    _must_be_run(run)
    paths = [
        c.path for c in ([commit_of_step(run, step)] if step is not None else _all_commits(run))
    ]
    paths += _aside(run) if all and step is None else []
    if not paths:
        raise CheckpointError(f"{run} has no checkpoint.", remedy="Is it the right folder?")
    console = Console(quiet=json)
    run_id = read_json_object(run / RUN_FILE).get("run_id")
    findings = []
    for path in paths:
        with console.status(path.name):
            problems = verify(path, run_id=run_id) or tensor_problems(path)
        findings.append({"folder": path.name, "step": _step_in(path.name), "problems": problems})
        words = "[red]damaged[/red]" if problems else "[green]whole[/green]"
        console.print(f"{_title(path.name)}: {words}")
        for problem in problems:
            console.print(f"  {problem}", markup=False)
    if json:
        print_json(findings)
    # 78: a person has to look; trying again does not mend a file.
    return ExitCode.CONFIG if any(found["problems"] for found in findings) else ExitCode.DONE


def prune(
    run: Path,
    *,
    keep_last: int | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: JsonFlag = False,
) -> None:
    """Remove checkpoints that the run's settings no longer want; a run does so itself as it saves.

    The first, the last, multiples of `checkpoint.keep_every_steps`, pinned ones and those that
    `jepa conduct` asks for stay. Nothing is removed unless the newest checkpoint that stays is
    whole.

    Args:
        run: Folder of the run.
        keep_last: Keep so many of the newest instead of `checkpoint.keep_last`.
        dry_run: Say what would go, remove nothing.
        json: Print the result as JSON.
    """
    _must_be_run(run)
    if keep_last is not None and keep_last < 1:
        raise UsageError(f"expected --keep-last of at least 1, got {keep_last}")
    config = _config(run).checkpoint
    if keep_last is not None:
        config = config.model_copy(update={"keep_last": keep_last})
    doomed = _doomed(run, config)
    if doomed and not dry_run:
        _newest_must_be_whole(run)
        doomed = retain.prune(run, config)
    if json:
        print_json(
            {"removed": [] if dry_run else doomed, "would_remove": doomed if dry_run else []}
        )
        return
    words = ", ".join(map(str, doomed)) or "none"
    Console().print(f"{'would remove' if dry_run else 'removed'} the checkpoints of steps: {words}")


def pin(
    run: Path,
    step: int,
    *,
    undo: Annotated[bool, Parameter(negative="")] = False,
    json: JsonFlag = False,
) -> None:
    """Keep a checkpoint for good, whatever the settings say.

    Args:
        run: Folder of the run.
        step: Step of the checkpoint.
        undo: Let the settings decide again.
        json: Print the result as JSON.
    """
    _must_be_run(run)
    commit = commit_of_step(run, step)
    (retain.unpin if undo else retain.pin)(commit)
    if json:
        print_json({"step": step, "pinned": not undo})
        return
    Console().print(f"step {step} {'is no longer pinned' if undo else 'stays for good'}")


def cat(
    run: Path, *, step: int | None = None, tensor: str | None = None, json: JsonFlag = False
) -> None:
    """Print what a checkpoint says of itself, or one of its tensors in numbers.

    Args:
        run: Folder of the run.
        step: Step of the checkpoint; the newest that is whole by default.
        tensor: Name of a tensor, such as teacher.blocks.0.norm1.weight.
        json: Print it as JSON.
    """
    _must_be_run(run)
    found = find_commit(run, step)
    if tensor is not None:
        facts = {"step": found.commit.step, **asdict(tensor_facts(found.commit.path, tensor))}
        print_json(facts) if json else _print_pairs(facts)
        return
    manifest = asdict(found.manifest)
    shapes = tensor_shapes(found.commit.path)
    if json:
        state = read_state(found.commit.path)
        print_json({"manifest": manifest, "state": state, "tensors": shapes})
        return
    files, prints = manifest.pop("files"), manifest.pop("fingerprints")
    _print_pairs({**manifest, **read_state(found.commit.path)})
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n{len(files)} files")
    for file in files:
        console.print(f"  {file['num_bytes']:>14,}  {file['sha256'][:16]}…  {file['path']}")
    console.print(f"\n{len(shapes)} tensors")
    for name, shape in shapes.items():
        console.print(f"  {prints.get(name, '?'):16}  {list(shape)!s:20}  {name}", markup=False)


def _row(run: Path, commit: Commit) -> dict[str, Any]:
    problems = verify(commit.path, digests=False)
    known = {"step": commit.step, "stage": _stage(run, commit.step), "problems": problems}
    known |= {"pinned": retain.is_pinned(commit), "path": str(commit.path)}
    try:
        manifest = layout.read_manifest(commit.path)
    except CheckpointError:
        return {**known, "created": None, "world_size": None, "files": 0, "bytes": 0}
    return {
        **known,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "files": len(manifest.files),
        "bytes": sum(entry.num_bytes for entry in manifest.files),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    age = "?"
    if row["created"]:
        age = duration((datetime.now(UTC) - datetime.fromisoformat(row["created"])).total_seconds())
    state = "not usable" if row["problems"] else "whole"
    return [
        str(row["step"]),
        row["stage"] or "?",
        f"{row['bytes'] / 2**20:.1f}",
        age,
        str(row["world_size"] or "?"),
        f"{state}, pinned" if row["pinned"] else state,
        Path(row["path"]).name,
    ]


def _stage(run: Path, step: int) -> str | None:
    try:
        return place_of_step(_config(run).stages, max(step, 1)).stage.name
    except (JepaError, ValueError):
        return None  # the list is worth having without it


def _config(run: Path) -> RunConfig:
    return load_config(run / CONFIG_FILE, RunConfig).config


def _all_commits(run: Path) -> list[Commit]:
    both = [*layout.list_commits(run), *layout.list_headless(run)]
    return sorted(both, key=lambda commit: commit.step)


def _aside(run: Path) -> list[Path]:
    return sorted(layout.checkpoints_dir(run).glob("aside-*"))


def _doomed(run: Path, config: CheckpointConfig) -> list[int]:
    return [commit.step for commit in retain.doomed_commits(run, config)]


def _newest_must_be_whole(run: Path) -> None:
    newest = layout.list_commits(run)[-1]
    problems = verify(newest.path)
    if problems:
        raise CheckpointError(
            f"Step {newest.step}, the newest of {run}, is not whole: {'; '.join(problems)}. "
            "Nothing was removed: an older one may be needed."
        )


def _step_in(name: str) -> int | None:
    return layout.step_of(name)


def _title(name: str) -> str:
    step = layout.step_of(name)
    return name if step is None else f"step {step}"


def _print_pairs(pairs: dict[str, Any]) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in pairs.items():
        grid.add_row(name.replace("_", " "), str(value))
    Console(highlight=False).print(grid)


def _must_be_run(run: Path) -> None:
    has_begun = any((run / name).is_file() for name in (RUN_FILE, CONFIG_FILE))
    if not has_begun and not layout.checkpoints_dir(run).is_dir():
        near = sorted(path.parent.name for path in run.parent.glob("*/checkpoints"))
        there = f" Runs beside it: {', '.join(near)}." if near else ""
        raise UsageError(
            f"{run} is not the folder of a run: it has no checkpoints.{there}",
            remedy="Give the folder that `jepa train` named, such as runs/NAME.",
        )
