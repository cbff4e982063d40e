"""`jepa probe`: what the frozen features of checkpoints are worth on a labelled task."""

import difflib
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.checkpoint.layout import list_commits, read_manifest
from pipeline.checkpoint.load import commit_of_step
from pipeline.cluster import local_ray
from pipeline.commands import JsonFlag, Overrides, print_json
from pipeline.commands.probe_table import differences, render
from pipeline.conduct.tasks import TaskNeeds, run_as_task
from pipeline.config.load import load_config
from pipeline.errors import CheckpointError, UsageError
from pipeline.exchange.hf_import import is_hf
from pipeline.exchange.layout import is_exchange, read_exchange
from pipeline.probe.evaluate import run_probe
from pipeline.probe.frozen import Which
from pipeline.probe.records import ProbeProgress, ProbeRecord, ProbeRequest
from pipeline.probe.task_files import find_task
from pipeline.probe.tasks import HeadName, TaskConfig
from pipeline.track.folder import CONFIG_FILE, PROBE_FOLDER

_ALL_HEADS: tuple[HeadName, ...] = ("attentive", "linear", "knn")
_Report = Callable[[ProbeProgress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOptions:
    """Which checkpoints and which heads."""

    step: int | None = None
    """Step to probe; the newest by default."""
    steps: str | None = None
    """Several steps to compare, as 0,200; `last` is the newest."""
    head: Literal["attentive", "linear", "knn", "all"] = "all"
    """Head that is fitted."""
    seeds: int = 1
    """Number of seeds that each fitted head is drawn with."""
    which: Which = "teacher"
    """The averaged teacher, as evaluations use, or the student."""
    ray: Annotated[bool, Parameter(negative="--no-ray")] = True
    """Run as a Ray task, where Ray is installed."""
    out: Path | None = None
    """Folder of results and cached features; `RUN/probes` by default."""


def probe(
    checkpoint: Path,
    /,
    *overrides: Overrides,
    task: str,
    options: Annotated[ProbeOptions | None, Parameter(name="*")] = None,
    json: JsonFlag = False,
) -> None:
    """Score the frozen features of one or more checkpoints of a run, side by side.

    The encoder is not changed: videos are encoded once, then small heads are fitted on the
    tokens. Step 0 is the untrained encoder, the floor that training has to leave. Each step, head
    and seed gives one file in `RUN/probes`; encoded features are kept in `RUN/probes/cache`,
    which may be deleted at any time.

    Args:
        checkpoint: Folder of a run (its newest checkpoint is taken), of one checkpoint, an
            exchange folder (`jepa ckpt import`), or a folder of transformers' VJEPA2Model.
        overrides: key=value laid over the task file, as clip.views=1.
        task: Task file, or the name of a shipped one, such as ssv2.
        options: Which checkpoints and which heads.
        json: Print the records as JSON.
    """
    asked = options or ProbeOptions()
    if asked.seeds < 1:
        raise UsageError(f"expected --seeds of at least 1, got {asked.seeds}")
    config = load_config(find_task(task), TaskConfig, overrides).config
    home, subjects = _subjects(checkpoint, asked.step, asked.steps)
    requests = [
        ProbeRequest(
            source=subject.path,
            step=subject.step,
            which=asked.which,
            task=config,
            heads=_ALL_HEADS if asked.head == "all" else (asked.head,),
            seeds=tuple(range(asked.seeds)),
            out=asked.out or home / PROBE_FOLDER,
        )
        for subject in subjects
    ]
    records = _run_all(requests, on_ray=asked.ray)
    if json:
        changes = [asdict(change) for change in differences(records)]
        print_json({"records": [asdict(one) for one in records], "differences": changes})
        return
    console = Console(highlight=False)
    for part in render(records, requests[0].out):
        console.print(part)


def _run_all(requests: Sequence[ProbeRequest], *, on_ray: bool) -> list[ProbeRecord]:
    """One after the other: each may use the whole machine."""
    console = Console(stderr=True, highlight=False)
    if on_ray and importlib.util.find_spec("ray") is None:
        console.print("Ray is not installed: the probe runs in this process.")
        on_ray = False
    records: list[ProbeRecord] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        report = _shown(progress)
        with local_ray() if on_ray else nullcontext():  # started once for all checkpoints
            for request in requests:
                if on_ray:
                    needs = _needs(request)
                    records += run_as_task(run_probe, request, needs=needs, report=report)
                else:
                    records += run_probe(request, report=report)
    return records


def _needs(request: ProbeRequest) -> TaskNeeds:
    return TaskNeeds(
        num_cpus=len(os.sched_getaffinity(0)),
        num_gpus=1 if torch.cuda.is_available() else 0,
        describe=f"probe {request.task.name} {request.label}",
    )


def _shown(progress: Progress) -> _Report:
    """One bar for each part of a probe, made when the part begins."""
    bars: dict[str, Any] = {}

    def report(event: ProbeProgress) -> None:
        if event.phase not in bars:
            bars[event.phase] = progress.add_task(event.phase, total=event.total)
        progress.update(bars[event.phase], completed=event.done, total=event.total)

    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """One set of weights, and the step they are of where that is known."""

    path: Path
    step: int | None


def _subjects(path: Path, step: int | None, steps: str | None) -> tuple[Path, list[_Subject]]:
    """The folder that results belong to, and the weights to probe."""
    if step is not None and steps is not None:
        raise UsageError("expected --step or --steps, got both")
    if path.name == "checkpoints" and path.is_dir():
        path = path.parent
    if (path / "manifest.json").is_file():
        _must_choose_nothing(step, steps, f"{path} is one checkpoint", f"{path.parent.parent}")
        return path.parent.parent, [_Subject(step=read_manifest(path).step, path=path)]
    if not (path / CONFIG_FILE).is_file():
        if not (is_exchange(path) or is_hf(path)):
            raise _no_run(path)
        _must_choose_nothing(step, steps, f"{path} holds one set of weights", "runs/NAME")
        return path, [_Subject(step=_step_of(path), path=path)]
    commits = list_commits(path)
    if not commits:
        raise CheckpointError(
            f"the run {path} has no checkpoint yet",
            remedy="Wait for the first save, or look at `jepa status` to see why there is none.",
        )
    wanted = [commit_of_step(path, n) for n in _steps(step, steps, commits[-1].step)]
    return path, [_Subject(step=commit.step, path=commit.path) for commit in wanted]


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
