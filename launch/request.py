"""From what a person asks for on the command line, and what the site file says, to a job."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.job import EACH, JobSpec, Kind, parse_duration
from launch.site import Site, find_site
from pipeline.config.load import load_config, resolved_yaml
from pipeline.config.report import changes
from pipeline.errors import ConfigError, UsageError
from pipeline.run import RunConfig
from pipeline.track.folder import CONFIG_FILE, EVENTS_FILE
from pipeline.track.jobs import JOBS_FILE
from pipeline.track.metrics import read_events

_VERBS: Mapping[Kind, str] = {"prep": "prep", "probe": "probe", "conduct": "conduct"}
# One step, and what ending takes: as the site's own figure is meant.
_BESIDE_SAVE_SECONDS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What `jepa launch` was asked for; None leaves it to the site file."""

    kind: Kind = "train"
    """What the job runs: train CONFIG, or with --kind the words of `jepa prep`, `probe`,
    `conduct`."""
    site: Path | None = None
    """Site file; by default site.yaml, slurm/site.yaml or k8s/site.yaml below the current
    folder."""
    set: tuple[str, ...] = ()
    """key=value laid over the site file, such as slurm.partition=debug; may be repeated."""
    nodes: int | None = None
    """Nodes of the job."""
    min_nodes: int | None = None
    """Fewest nodes the job goes on with when others are lost; by default all of them."""
    gpus_per_node: int | None = None
    """GPUs of each node, with one rank for each; 0 trains on processors."""
    ranks_per_node: int | None = None
    """Ranks of each node where there are no GPUs."""
    time: str | None = None
    """Time limit, such as 24:00:00 or 2-12:00:00; a training job that reaches it saves and queues
    again."""
    name: str | None = None
    """Name of the job; by default the run's."""
    folder: Path | None = None
    """Where a job without a run keeps log and records; by default runs/NAME."""
    each: tuple[str, ...] = ()
    """An array: one job for each value, which stands for {} in the words; may be repeated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A job with the cluster that it is for."""

    job: JobSpec
    site: Site


def prepare(words: Sequence[str], request: Request) -> Prepared:
    """A job from its words.

    Args:
        words: CONFIG and key=value of a training job, else the words after `jepa KIND`.
        request: The flags.

    Raises:
        UsageError: Words or flags are missing or contradict each other.
        ConfigError: The configuration, or the site file, is wrong; or the run's folder holds a
            run of another one.
    """
    site = find_site(request.site, (*request.set, *_flags(request)))
    if request.kind == "train":
        return Prepared(job=with_measured_grace(_train_job(words, request, site)), site=site)
    return Prepared(job=_side_job(words, request, site), site=site)


def fitting_nodes(config: RunConfig, ranks_per_node: int, most: int) -> tuple[int, ...]:
    """Numbers of nodes, up to `most`, that share the global batch in whole micro-batches."""
    batch, sizes = config.global_batch, {stage.micro_batch for stage in config.stages}
    return tuple(
        nodes
        for nodes in range(1, most + 1)
        if all(batch % (size * ranks_per_node * nodes) == 0 for size in sizes)
    )


def with_measured_grace(job: JobSpec) -> JobSpec:
    """The job with at least as much grace as the longest save that its run has told of."""
    if job.run_dir is None or not (job.run_dir / EVENTS_FILE).is_file():
        return job
    told = (event.details.get("behind_seconds") for event in read_events(job.run_dir))
    longest = max((float(said) for said in told if isinstance(said, int | float)), default=0.0)
    needed = math.ceil(longest) + _BESIDE_SAVE_SECONDS if longest else 0
    return replace(job, grace_seconds=max(job.grace_seconds, needed))


def _train_job(words: Sequence[str], request: Request, site: Site) -> JobSpec:
    if not words:
        raise UsageError("expected CONFIG, the YAML file of a run, got nothing")
    if request.each:
        raise UsageError(
            "--each makes an array of side jobs; a training job is one job",
            remedy="Launch one job for each run, with another name=… each.",
        )
    path, overrides = Path(words[0]), words[1:]
    config = load_config(path, RunConfig, overrides).config
    run_dir = Path.cwd() / config.run_dir
    _must_be_same(run_dir, config)
    text = resolved_yaml(config)
    # Frozen: what is edited while the job waits in the queue is for the next one.
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    frozen = run_dir / "jobs" / f"config-{digest}.yaml"
    ranks = _ranks(site)
    return JobSpec(
        name=request.name or config.name,
        kind="train",
        argv=("train", str(frozen), "--or-resume"),
        run_dir=run_dir,
        config_path=frozen,
        config_text=text,
        node_counts=_node_counts(config, ranks, site.nodes, request.min_nodes or site.nodes),
        min_nodes=request.min_nodes,
        **_machines(site),
    )


def _side_job(words: Sequence[str], request: Request, site: Site) -> JobSpec:
    verb = _VERBS[request.kind]
    if not words:
        raise UsageError(f"expected the words that follow `jepa {verb}`, got none")
    if request.each and not any(EACH in word for word in words):
        raise UsageError(
            f"--each gives every job of the array a value, but no word holds {EACH}",
            remedy=f"Put {EACH} where the value belongs, as in `--steps {EACH}`.",
        )
    name = request.name or request.kind
    folder = request.folder or _run_of(words) or Path("runs") / name
    nodes = request.nodes or 1  # the site's number is for training
    argv = (verb, *words)
    if nodes > 1:
        if argv[:2] != ("prep", "run") and verb != "conduct":
            raise UsageError(
                f"`jepa {' '.join(argv[:2])}` runs on one node, not on {nodes}",
                remedy="`jepa prep run` and `jepa conduct` spread over several, by Ray.",
            )
        argv = (*argv, "--address", "auto")
    return JobSpec(
        name=name,
        kind=request.kind,
        argv=argv,
        run_dir=Path.cwd() / folder,
        min_nodes=request.min_nodes,
        each=request.each,
        **{**_machines(site), "nodes": nodes},
    )


def _machines(site: Site) -> dict:
    return {
        "work_dir": Path.cwd(),
        "nodes": site.nodes,
        "gpus_per_node": site.gpus_per_node,
        "ranks_per_node": _ranks(site),
        "cpus_per_rank": site.cpus_per_rank,
        "memory_gib": site.memory_gib,
        "time_limit_seconds": parse_duration(site.time),
        "grace_seconds": site.grace_seconds,
        "environment": site.environment,
        "image": site.image,
        "mounts": tuple(mount.mount for mount in site.mounts),
    }


def _flags(request: Request) -> list[str]:
    """Flags that are nothing but keys of the site file, said again."""
    names = ("nodes", "gpus_per_node", "ranks_per_node", "time")
    given = {name: getattr(request, name) for name in names}
    return [f"{name}={value!r}" for name, value in given.items() if value is not None]


def _ranks(site: Site) -> int:
    return site.ranks_per_node or site.gpus_per_node or 1


def _node_counts(config: RunConfig, ranks: int, nodes: int, least: int) -> tuple[int, ...]:
    fitting = fitting_nodes(config, ranks, nodes)
    if nodes not in fitting:
        more = ", ".join(map(str, fitting_nodes(config, ranks, config.global_batch)))
        raise ConfigError(
            f"{nodes} nodes of {ranks} ranks cannot share the global batch of "
            f"{config.global_batch} clips in whole micro-batches.",
            remedy=f"Numbers of nodes that can: {more or 'none'}; or change global_batch or "
            "micro_batch.",
        )
    return tuple(number for number in fitting if number >= least) if least < nodes else ()


def _run_of(words: Sequence[str]) -> Path | None:
    """The first word that is the folder of a run, of one whose job still waits as well."""
    folders = (Path(word) for word in words if not word.startswith("-"))
    marks = (CONFIG_FILE, JOBS_FILE)
    return next((f for f in folders if any((f / mark).is_file() for mark in marks)), None)


def _must_be_same(run_dir: Path, config: RunConfig) -> None:
    """A job of another configuration would queue for hours only to be refused when it starts."""
    path = run_dir / CONFIG_FILE
    if not path.is_file() or not any((run_dir / "checkpoints").glob("step-*")):
        return
    found = [change.key for change in changes(load_config(path, RunConfig).config, config)]
    if found:
        raise ConfigError(
            f"{run_dir} holds a run with other values of: {', '.join(found[:10])}.",
            remedy=f"Put them back, give the new run another name=…, or edit {path} on purpose.",
        )
