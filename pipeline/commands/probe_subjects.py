"""Which weights `jepa probe` is given: checkpoints of a run, or those of others."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.layout import list_commits, read_manifest
from pipeline.checkpoint.load import commit_of_step
from pipeline.errors import CheckpointError, UsageError
from pipeline.exchange.hf_import import is_hf
from pipeline.exchange.layout import is_exchange, read_exchange
from pipeline.track.folder import CONFIG_FILE


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One set of weights, and the step they are of where that is known."""

    path: Path
    step: int | None


def subjects_of(path: Path, step: int | None, steps: str | None) -> tuple[Path, list[Subject]]:
    """The folder that results belong to, and the weights to probe.

    Raises:
        UsageError: There is nothing of the kind at `path`.
        CheckpointError: The run has no such checkpoint.
    """
    if step is not None and steps is not None:
        raise UsageError("expected --step or --steps, got both")
    if path.name == "checkpoints" and path.is_dir():
        path = path.parent
    if (path / "manifest.json").is_file():
        _must_choose_nothing(step, steps, f"{path} is one checkpoint", f"{path.parent.parent}")
        return path.parent.parent, [Subject(step=read_manifest(path).step, path=path)]
    if not (path / CONFIG_FILE).is_file():
        if not (is_exchange(path) or is_hf(path)):
            raise _no_run(path)
        _must_choose_nothing(step, steps, f"{path} holds one set of weights", "runs/NAME")
        return path, [Subject(step=_step_of(path), path=path)]
    commits = list_commits(path)
    if not commits:
        raise CheckpointError(
            f"the run {path} has no checkpoint yet",
            remedy="Wait for the first save, or look at `jepa status` to see why there is none.",
        )
    wanted = [commit_of_step(path, n) for n in _steps(step, steps, commits[-1].step)]
    return path, [Subject(step=commit.step, path=commit.path) for commit in wanted]


def _must_choose_nothing(step: int | None, steps: str | None, what: str, run: str) -> None:
    if step is not None or steps is not None:
        raise UsageError(
            f"{what}: --step and --steps choose among those of a run",
            remedy=f"Give the run's folder: {run}.",
        )


def _step_of(path: Path) -> int | None:
    if not is_exchange(path):
        return None
    step = read_exchange(path, verify=False).provenance.get("step")
    return step if isinstance(step, int) else None


def _steps(step: int | None, steps: str | None, newest: int) -> list[int]:
    if steps is None:
        return [newest if step is None else step]
    words = [word.strip() for word in steps.split(",")]
    wrong = [word for word in words if word != "last" and not word.isdecimal()]
    if wrong:
        raise UsageError(
            f"expected --steps as numbers or `last` with commas between, got {steps!r}",
            remedy="For example --steps 0,last.",
        )
    return list(dict.fromkeys(newest if word == "last" else int(word) for word in words))


def _no_run(path: Path) -> UsageError:
    if path.is_dir():
        there = [found.parent.name for found in sorted(path.glob(f"*/{CONFIG_FILE}"))][:5]
        hint = f"; there are runs in it: {', '.join(there)}" if there else ""
        return UsageError(f"{path} is neither a run nor a checkpoint{hint}")
    folder = path.parent
    while not folder.is_dir():
        folder, path = folder.parent, folder
    names = [found.name for found in sorted(folder.iterdir()) if found.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names[:5])}"
    return UsageError(
        f"expected the folder of a run or of a checkpoint, found nothing at {path}"
        + (f"; {hint}" if names else ""),
        remedy="Give the folder that `jepa train` named, such as runs/NAME.",
    )
