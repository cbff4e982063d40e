"""`jepa check`."""

import contextlib
import json as json_text
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console

from launch.local import start_ranks
from launch.preflight.driver import Outcome, leave, run_preflight
from launch.preflight.finding import Situation, bad_nodes
from launch.preflight.table import render
from pipeline.config.load import load_config
from pipeline.environment import free_port, node_name, read_launch
from pipeline.errors import ExitCode, StorageError, UsageError
from pipeline.files import write_atomically
from pipeline.place import Launch
from pipeline.plan.cluster import Cluster
from pipeline.run import RunConfig

_SECONDS, _LEAST_SECONDS = 120.0, 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckOptions:
    """What a check compares with, and where its answer goes."""

    gpus_per_node: int | None = None
    """GPUs that every node has to show, which is how many ranks it will have; by default what most
    nodes show."""
    cluster: Path | None = None
    """YAML file of the site's figures, to compare measured bandwidths with."""
    bad_nodes: Path | None = None
    """File for bad machines, one a line by the scheduler's name; there only if there are some. By
    default RUNS_FOLDER/NAME.bad-nodes, with --at-start."""
    seconds: float = _SECONDS
    """When all checks must be over."""


def check(
    config: Path,
    *overrides: Annotated[str, Parameter(help="key=value over the file, e.g. seed=7.")],
    ranks: int | None = None,
    at_start: bool = False,
    options: Annotated[CheckOptions | None, Parameter(name="*")] = None,
    json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> ExitCode:
    """Check machines, storage, data and network before a run.

    Checks this machine; with `--ranks N`, or as one process a node (or a GPU) of srun or torchrun,
    all of them and the network in between. Ends with 0 if the run can start, 78 if no retry helps,
    76 if some machines are bad, 74 if the storage is.

    Args:
        config: YAML file of the run.
        overrides: key=value laid over the file; list items by position, as stages.0.steps=100.
        ranks: Processes to start on this machine, one for each GPU where there are any.
        at_start: As a job's first step: bad machines go into a file for the scheduler.
        options: What the machines are compared with, and how long it may take.
        json: Print the findings as JSON.
    """
    begin, chosen = time.monotonic(), options or CheckOptions()
    _must_be_possible(ranks, chosen)
    run = load_config(config, RunConfig, overrides).config
    launch = read_launch()
    if launch.launcher == "alone" and ranks is not None and ranks > 1:
        return _on_ranks(ranks)
    situation = Situation(
        config=run,
        launch=launch,
        node=node_name(),
        ranks_here=chosen.gpus_per_node or _ranks_here(launch),
        cluster=load_config(chosen.cluster, Cluster).config if chosen.cluster else None,
        wanted_gpus=chosen.gpus_per_node,
    )
    path = chosen.bad_nodes
    if path is None and at_start:
        path = run.runs_folder / f"{run.name}.bad-nodes"
    outcome = _run(situation, chosen.seconds, quiet=json or at_start)
    if launch.rank == 0:
        _show(outcome, time.monotonic() - begin, as_json=json)
        _write_bad_nodes(path, bad_nodes(outcome.findings))
    sys.stdout.flush()
    sys.stderr.flush()
    leave(outcome)
    return ExitCode(outcome.code)


def _must_be_possible(ranks: int | None, options: CheckOptions) -> None:
    if options.seconds < _LEAST_SECONDS:
        raise UsageError(
            f"expected --seconds of at least {_LEAST_SECONDS:g}, got {options.seconds:g}"
        )
    for name, value in (("--ranks", ranks), ("--gpus-per-node", options.gpus_per_node)):
        if value is not None and value < 1:
            raise UsageError(f"expected {name} of at least 1, got {value}")


def _run(situation: Situation, seconds: float, *, quiet: bool) -> Outcome:
    console = Console(stderr=True)
    is_shown = situation.launch.rank == 0 and not quiet and console.is_terminal
    with console.status("starting") if is_shown else contextlib.nullcontext() as status:
        return run_preflight(
            situation, seconds=seconds, say=status.update if status else lambda _words: None
        )


def _on_ranks(ranks: int) -> ExitCode:
    """The same command once a rank of this machine."""
    arguments = ["-m", "pipeline.cli", *sys.argv[1:]]
    return ExitCode(start_ranks(arguments, num_ranks=ranks, port=free_port()))


def _ranks_here(launch: Launch) -> int:
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return max(1, visible, launch.local_world_size)


def _show(outcome: Outcome, seconds: float, *, as_json: bool) -> None:
    if as_json:
        document = {
            "exit_code": outcome.code,
            "seconds": round(seconds, 2),
            "bad_nodes": bad_nodes(outcome.findings),
            "findings": [one.to_dict() for one in outcome.findings],
        }
        sys.stdout.write(json_text.dumps(document, indent=2, default=str) + "\n")
        return
    Console(highlight=False).print(render(outcome.findings, seconds))


def _write_bad_nodes(path: Path | None, nodes: list[str]) -> None:
    if path is None:
        return
    try:
        if nodes:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(f"{node}\n" for node in nodes))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}") from error
