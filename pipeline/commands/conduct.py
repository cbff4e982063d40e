"""`jepa conduct`: what is done with every checkpoint of a run, beside its training."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from pipeline.cluster import confine_worker, local_ray
from pipeline.commands import JsonFlag, print_json
from pipeline.conduct.driver import Conductor, Summary, check_resources, is_idle, summed_up
from pipeline.conduct.follow import Follow
from pipeline.conduct.prepare import find_config, prepare_probes
from pipeline.conduct.stop import StopSignals
from pipeline.config.load import resolved_data
from pipeline.errors import ExitCode, UsageError


def conduct(
    *runs: Annotated[Path, Parameter(help="Folder of a run; several are taken care of in turn.")],
    config: Path | None = None,
    once: Annotated[bool, Parameter(negative="")] = False,
    address: str | None = None,
    retry: Annotated[bool, Parameter(negative="")] = False,
    json: JsonFlag = False,
) -> ExitCode:
    """Follow runs' checkpoints: verify, mirror, export, probe, record, judge, report, retain.

    Runs on Ray beside the training, on this machine or on a cluster, with low priority. It may be
    stopped, killed and started again at any time: RUN/conduct.jsonl says what was done and why,
    and the next start goes on from there. No training and no resume needs it. It ends when all runs
    have finished and everything is done.

    Args:
        runs: Folders of runs.
        config: What to do, as `jepa config schema --of conduct` lists it; RUN/conduct.yaml if there
            is one run and it has that. Without either: verify, judge, report, retain.
        once: Do what there is to do now, then end.
        address: host:port of a Ray cluster to join, or `auto` for the one that this process was
            started in; without it a small Ray is started on this machine.
        retry: Try again what was given up, and verify again what was found damaged.
        json: Print how it ended as JSON.
    """
    if not runs:
        raise UsageError("expected the folder of at least one run", remedy="jepa conduct runs/NAME")
    folders = list(dict.fromkeys(run.resolve() for run in runs))
    settings = find_config(config, folders)
    probes = prepare_probes(settings)
    if address is None:
        check_resources(settings)
    # Before Ray starts, whose processes inherit it.
    confine_worker(nice=settings.nice, hide_gpus=False)
    console = Console(stderr=True, highlight=False)
    stop = StopSignals()
    with stop.listening(), ExitStack() as opened:
        follows = []
        for run in folders:
            follow = Follow(run, settings, probes)
            opened.callback(follow.close)
            follow.note("start", once=once, settings=resolved_data(settings))
            if retry:
                follow.note("retry", reason="--retry was given")
            follows.append(follow)
        if once and is_idle(follows):
            summary = summed_up(follows, once=True)
        else:
            ours = settings.ray
            with local_ray(ours.num_cpus, address, num_gpus=ours.num_gpus) as ray:
                conductor = Conductor(follows, settings, ray, stop, _teller(console))
                summary = conductor.run(once=once)
    if json:
        print_json({"runs": [str(run) for run in folders], **asdict(summary)})
    console.print(_words(summary), markup=False, soft_wrap=True)
    return _exit_code(summary)


def _teller(console: Console) -> Callable[[str], None]:
    def tell(line: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)

    return tell


def _words(summary: Summary) -> str:
    parts = [
        f"{summary.stopped_by} was received"
        if summary.stopped_by
        else "Everything that can be done is done"
    ]
    if summary.num_open:
        parts.append(f"{summary.num_open} jobs are left for the next start")
    if summary.num_lost:
        parts.append(
            f"{summary.num_lost} jobs were given up or checkpoints found damaged: conduct.jsonl "
            "says why, --retry tries again"
        )
    return "; ".join(parts) + "."


def _exit_code(summary: Summary) -> ExitCode:
    if summary.stopped_by and (summary.num_open or summary.goes_on):
        return ExitCode.SAVED_RUN_AGAIN
    # 78: a person has to look; starting again does not mend it.
    return ExitCode.CONFIG if summary.num_lost else ExitCode.DONE
