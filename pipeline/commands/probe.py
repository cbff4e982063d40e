"""`jepa probe`: what the frozen features of checkpoints are worth on a labelled task."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cluster import local_ray
from pipeline.commands import JsonFlag, Overrides, print_json
from pipeline.commands.probe_subjects import subjects_of
from pipeline.commands.probe_table import differences, render
from pipeline.conduct.features import encode_on_workers
from pipeline.conduct.tasks import TaskNeeds, run_as_task
from pipeline.config.load import load_config
from pipeline.errors import UsageError
from pipeline.exchange.heads import read_head
from pipeline.exchange.open import open_networks
from pipeline.exchange.transfer import ExportRequest, export_networks
from pipeline.probe.evaluate import run_probe
from pipeline.probe.frozen import Which
from pipeline.probe.records import ProbeProgress, ProbeRecord, ProbeRequest
from pipeline.probe.task_files import find_task
from pipeline.probe.tasks import HeadName, TaskConfig
from pipeline.report.probe_page import write_probe_page
from pipeline.track.folder import PROBE_FOLDER

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
    workers: PositiveInt = 1
    """Ray workers that encode; each has one GPU, or one CPU where there is none."""
    address: str | None = None
    """Ray cluster to join, as host:port or `auto`; it is started on this machine otherwise."""
    save_head: Annotated[bool, Parameter(negative="")] = False
    """Keep the weights of the chosen attentive heads, in `OUT/heads`."""
    given_head: Path | None = None
    """Score this attentive head and fit none: a file of --save-head, a folder of transformers'
    VJEPA2ForVideoClassification, or an official probe's .pt file."""
    export_head: Path | None = None
    """Folder to write encoder and fitted attentive head to, as transformers'
    VJEPA2ForVideoClassification."""
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
    tokens. Step 0 is the untrained encoder, the floor that training has to leave. Each step gives
    one file in `RUN/probes` with the scores of all heads and seeds, and probes.html there shows
    confusion and hardest clips; encoded features are kept in `RUN/probes/cache`, which may be
    deleted at any time.

    Args:
        checkpoint: Folder of a run (its newest checkpoint is taken), of one checkpoint, an
            exchange folder (`jepa ckpt import`), or a folder of transformers' VJEPA2Model.
        overrides: key=value laid over the task file, as clip.views=1.
        task: Task file, or the name of a shipped one, such as ssv2.
        options: Which checkpoints and which heads.
        json: Print the records as JSON.
    """
    asked = options or ProbeOptions()
    _check_options(asked)
    config = load_config(find_task(task), TaskConfig, overrides).config
    home, subjects = subjects_of(checkpoint, asked.step, asked.steps)
    requests = [
        ProbeRequest(
            source=subject.path,
            step=subject.step,
            which=asked.which,
            task=config,
            heads=_heads(asked),
            seeds=tuple(range(asked.seeds)),
            out=asked.out or home / PROBE_FOLDER,
            save_head=asked.save_head or asked.export_head is not None,
            given_head=asked.given_head,
        )
        for subject in subjects
    ]
    if asked.export_head is not None and len(requests) > 1:
        raise UsageError("--export-head takes one checkpoint, got several --steps")
    records = _run_all(requests, asked)
    page = write_probe_page(requests[0].out)
    if asked.export_head is not None:
        _export(requests[0], asked.export_head)
    if json:
        changes = [asdict(change) for change in differences(records)]
        print_json({"records": [asdict(one) for one in records], "differences": changes})
        return
    console = Console(highlight=False)
    for part in render(records, requests[0].out):
        console.print(part)
    console.print(f"confusion and hardest clips: {page}", markup=False, soft_wrap=True)


def _heads(asked: ProbeOptions) -> tuple[HeadName, ...]:
    if asked.given_head is not None:
        return ("attentive",)
    return _ALL_HEADS if asked.head == "all" else (asked.head,)


def _check_options(asked: ProbeOptions) -> None:
    if asked.seeds < 1:
        raise UsageError(f"expected --seeds of at least 1, got {asked.seeds}")
    if asked.given_head is not None and (asked.save_head or asked.export_head is not None):
        raise UsageError("--given-head fits nothing that --save-head or --export-head could keep")
    wanted = asked.given_head or asked.export_head
    if wanted is not None and asked.head not in ("attentive", "all"):
        raise UsageError(f"{wanted} is about the attentive head, but --head {asked.head} was asked")
    if asked.workers > 1 and not asked.ray:
        raise UsageError("--workers needs Ray, but --no-ray was given")
    if asked.address is not None and not asked.ray:
        raise UsageError("--address is Ray's, but --no-ray was given")
    num_gpus = torch.cuda.device_count()
    if asked.address is None and 0 < num_gpus < asked.workers:
        raise UsageError(f"--workers {asked.workers}: each takes a GPU, and there are {num_gpus}")


def _export(request: ProbeRequest, out: Path) -> None:
    """The encoder and the head of the first seed, as transformers has them."""
    head = read_head(request.head_path(request.seeds[0]))
    clip = request.task.clip
    asked = ExportRequest(
        format="hf",
        weights=request.which,
        frames=clip.frames,
        resolution=clip.resolution,
        head=head,
    )
    exported = export_networks(
        open_networks(request.source, verify=False), out, asked, lambda *_: None
    )
    apart = exported.difference
    told = (
        "not compared: transformers is not installed here"
        if apart is None
        else f"largest difference of logits from transformers' {apart.logits:.1e}"
    )
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"{out}: {told}", markup=False)


def _run_all(requests: Sequence[ProbeRequest], asked: ProbeOptions) -> list[ProbeRecord]:
    """One after the other: each may use the whole machine."""
    on_ray, workers = asked.ray, asked.workers
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
        with (
            local_ray(_cpus(workers), asked.address) if on_ray else nullcontext()
        ):  # started once for all checkpoints
            for request in requests:
                if on_ray and workers > 1:
                    each = _worker_needs(request)
                    encode_on_workers(request, workers=workers, needs=each, report=report)
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


def _cpus(workers: int) -> int:
    """CPUs that Ray may hand out: every worker gets its own, even if they have to share cores."""
    return max(workers, len(os.sched_getaffinity(0)))


def _worker_needs(request: ProbeRequest) -> TaskNeeds:
    # One CPU whatever the machine has: sums over other numbers of threads end in other bits.
    gpus = 1 if torch.cuda.is_available() else 0
    return TaskNeeds(num_cpus=1, num_gpus=gpus, describe=f"encode {request.label}")


def _shown(progress: Progress) -> _Report:
    """One bar for each part of a probe, made when the part begins."""
    bars: dict[str, Any] = {}

    def report(event: ProbeProgress) -> None:
        if event.note:
            progress.console.print(event.note, markup=False, soft_wrap=True)
            return
        if event.phase not in bars:
            bars[event.phase] = progress.add_task(event.phase, total=event.total)
        progress.update(bars[event.phase], completed=event.done, total=event.total)

    return report
