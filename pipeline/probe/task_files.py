"""Where task files are: a path, or the name of one that is shipped."""

import difflib
from pathlib import Path

from pipeline.config.load import SHIPPED_CONFIGS
from pipeline.errors import UsageError


def find_task(task: str) -> Path:
    """The file of a task.

    Args:
        task: A path, or the name of a shipped task, such as ssv2.

    Raises:
        UsageError: There is none; the nearest names are told.
    """
    path, shipped = Path(task), SHIPPED_CONFIGS / "probes"
    if path.is_file() or path.is_dir():
        return path  # a folder is refused, with its files' names, by whoever reads it
    names = {file.stem: file for file in sorted(shipped.glob("*.yaml"))}
    if task in names:
        return names[task]
    beside = sorted(file.name for file in path.parent.glob("*.yaml"))
    near = difflib.get_close_matches(path.name, beside, n=2)
    near += difflib.get_close_matches(path.stem, list(names), n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(
        f"expected a task file, found none at {task}{hint}",
        remedy=f"Give a task file or one of the shipped tasks: {', '.join(names)}.",
    )
