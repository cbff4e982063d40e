"""Which commits stay: pruned, pinned, set aside; the run's owner or a person's command calls these.

One process at a time removes commits: the one that owns the run's lease. What others want to stay
or to go, they write down as wishes (`checkpoint.wishes`).
"""

import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import CheckpointConfig, Commit
from pipeline.checkpoint.wishes import read_wishes
from pipeline.files import remove_leftovers, sync_folder


def prune(
    run_dir: Path, config: CheckpointConfig, *, may_remove: Callable[[], object] = lambda: None
) -> list[int]:
    """Removes commits that are no longer wanted; called when a newer one has been published.

    Args:
        run_dir: Folder of the run.
        config: The run's settings.
        may_remove: Raises if the caller no longer owns the run; asked before every removal.

    Returns:
        Steps that were removed.

    Raises:
        OSError: A commit cannot be moved away, or wishes cannot be read.
    """
    removed = []
    for commit in doomed_commits(run_dir, config):
        may_remove()
        # Out of the list of commits first: half a removal must not look like a checkpoint.
        doomed = commit.path.with_name(f"{commit.path.name}.partial-removed")
        commit.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(commit.step)
    return removed


def doomed_commits(run_dir: Path, config: CheckpointConfig) -> list[Commit]:
    """Commits that nobody wants.

    Kept are the first (untrained weights), the newest `keep_last`, multiples of
    `keep_every_steps`, pinned ones, and those that work beside the run asks for.

    Raises:
        OSError: Wishes cannot be read.
    """
    commits = layout.list_commits(run_dir)
    steps = [commit.step for commit in commits]
    wishes = read_wishes(run_dir)
    doomed = {*unwanted_steps(steps, config), *wishes.free.intersection(_middle(steps, config))}
    doomed = {step for step in doomed if wishes.why(step) is None}
    return [commit for commit in commits if commit.step in doomed and not is_pinned(commit)]


def unwanted_steps(steps: Sequence[int], config: CheckpointConfig) -> list[int]:
    """Which of these steps, rising, no setting wants to keep; pins are the caller's question."""
    every = config.keep_every_steps
    return [step for step in _middle(steps, config) if every is None or step % every]


def pin(commit: Commit) -> None:
    """Keeps a commit for good, whatever the settings say."""
    (commit.path / layout.PINNED).touch()
    sync_folder(commit.path)


def unpin(commit: Commit) -> None:
    """Gives a pinned commit back to the settings."""
    (commit.path / layout.PINNED).unlink(missing_ok=True)


def is_pinned(commit: Commit) -> bool:
    """Whether a commit is kept for good."""
    return (commit.path / layout.PINNED).exists()


def set_aside_after(run_dir: Path, step: int) -> list[str]:
    """Renames commits newer than `step`, so that a run which goes on from there leads on alone.

    They stay on disk as `aside-…`: nothing takes them for checkpoints, a person can rename them
    back or remove them. Called by rank 0.

    Returns:
        Their new names.
    """
    names = []
    for commit in layout.list_commits(run_dir):
        if commit.step > step:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
            target = commit.path.with_name(f"aside-{commit.path.name}-{stamp}")
            commit.path.rename(target)
            names.append(target.name)
    return names


def clear_partials(run_dir: Path) -> list[str]:
    """Removes saves that were cut short; called by rank 0 before a run goes on."""
    partials = layout.list_partials(run_dir)
    for partial in partials:
        shutil.rmtree(partial, ignore_errors=True)
    remove_leftovers(layout.checkpoints_dir(run_dir) / layout.LATEST)
    return [partial.name for partial in partials]


def _middle(steps: Sequence[int], config: CheckpointConfig) -> Sequence[int]:
    """Neither the first nor among the newest, which stay whatever anybody wishes."""
    return steps[1 : -config.keep_last]
