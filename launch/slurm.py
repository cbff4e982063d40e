"""A job as the batch script that Slurm gets: directives, what differs from job to job, the rest.

The rest is `slurm_job.sh`, the same in every job and readable by itself. All that differs stands
above it as variables, each quoted for the shell, so that no name, path or word can be more than
text there. Directives take no quoting, so they hold nothing but checked words.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.job import JobSpec, duration_text
from launch.site import Site, SlurmSite
from pipeline.errors import UsageError

BODY = Path(__file__).with_name("slurm_job.sh")
# What means something to sbatch in a directive: blanks, quotes, backslashes, comments, patterns.
_BARE_WORD = re.compile(r"[A-Za-z0-9_./:=@%+-]+")
_PLAIN_PATH = re.compile(r"/[^\s\"'\\#%\x00-\x1f\x7f]*")


def render(job: JobSpec, site: Site, *, after: Sequence[str] = ()) -> str:
    """The batch script of a job.

    Args:
        job: The job; its `run_dir` is where it keeps its records.
        site: The cluster.
        after: Slurm's words for what the job waits for, such as `afterok:17`.

    Raises:
        UsageError: A folder's name cannot stand in a directive, or there is no run's folder.
    """
    if job.run_dir is None:
        raise UsageError("expected a folder for the job's logs and records, got none")
    lines = [
        "#!/bin/bash",
        f"# {job.kind} of {job.name}: submit with `sbatch FILE`; edit what stands below as needed.",
        *(f"#SBATCH {option}" for option in _directives(job, site, after)),
        "",
        "# ---- This job " + "-" * 82,
        "",
        *_variables(job, site),
    ]
    return "\n".join(lines) + "\n\n" + BODY.read_text()


def log_path(job: JobSpec) -> str:
    """The job's log, with Slurm's own `%` words for its number."""
    number = "%A_%a" if job.is_array else "%j"
    return f"{_plain(str(job.run_dir))}/jobs/%x-{number}.out"


def quoted(text: str) -> str:
    """A text as one word of bash, on one line whatever is in it."""
    if _BARE_WORD.fullmatch(text):
        return text
    if text.isprintable():
        return "'" + text.replace("'", "'\"'\"'") + "'"
    escaped = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in text.encode("utf-8", "surrogateescape")
    )
    return f"$'{''.join(escaped)}'"


def _directives(job: JobSpec, site: Site, after: Sequence[str]) -> list[str]:
    slurm = site.slurm
    tasks, cpus = _tasks_per_node(job, slurm), _cpus_per_task(job, slurm)
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        *_gpus(job, slurm),
        *([f"--mem={job.memory_gib}G"] if job.memory_gib else []),
        f"--time={duration_text(job.time_limit_seconds)}",
        f"--signal=B:USR2@{job.grace_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={log_path(job)}",
        f"--chdir={_plain(str(job.work_dir))}",
    ]
    if job.is_array:
        options.append(f"--array=0-{len(job.each) - 1}")
    names = ("partition", "account", "qos", "constraint", "reservation", "exclude")
    options += [f"--{name}={value}" for name in names if (value := getattr(slurm, name))]
    if slurm.exclusive and job.kind == "train":
        options.append("--exclusive")
    if after:
        options += [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"]
    return [*options, *slurm.extra]


def _gpus(job: JobSpec, slurm: SlurmSite) -> list[str]:
    if not job.gpus_per_node or slurm.gpu_request == "none":
        return []
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    if slurm.gpu_request == "gres":
        return [f"--gres=gpu:{kind}{job.gpus_per_node}"]
    return [f"--gpus-per-node={kind}{job.gpus_per_node}"]


def _variables(job: JobSpec, site: Site) -> list[str]:
    beside = "ray" if job.is_on_ray else "single"
    launcher = site.slurm.launcher if job.kind == "train" else beside
    command = (site.python, "-m", "pipeline.cli", *job.argv)
    return [
        "# Folder of the run: its checkpoints tell progress, jobs/ keeps logs and records.",
        f"run_dir={quoted(str(job.run_dir))}",
        "# What every task runs; {} stands for the value of `each` that an array's job has.",
        f"command={_array(command)}",
        f"each={_array(job.each)}",
        f"launcher={launcher}    # srun, torchrun, ray or single",
        f"agent={_array(_agent(launcher, job, site))}",
        "# Checks on every node before training, and what they may be told; empty: none.",
        f"preflight={_array(_preflight(job, site))}",
        "# Numbers of nodes that share the global batch evenly; empty: any.",
        f"node_counts={_array(map(str, job.node_counts))}",
        f"min_nodes={job.least_nodes}    # it goes on with so few if others are lost",
        f"max_nodes={job.nodes}",
        f"tasks_per_node={_tasks_per_node(job, site.slurm)}",
        f"cpus_per_task={_cpus_per_task(job, site.slurm)}",
        f"max_failures={site.slurm.max_failures}    # in a row, without a new checkpoint",
        "lost_seconds=120    # after a rank has ended, the others may go on for so long",
        f"grace_seconds={job.grace_seconds}    # the same as in --signal",
        f"scratch={quoted(site.scratch)}    # on each node's own disk",
        "# Container: options of srun (pyxis), or what stands before the command (apptainer).",
        f"step_options={_array(_step_options(job, site))}",
        f"inside={_array(_inside(job, site))}",
        "unset TORCH_EXTENSIONS_DIR    # the submitter's own is not meant for a job",
        *_exports(job, site),
        "setup() {",
        *(f"  {line}" for line in site.slurm.setup or (":",)),
        "}",
    ]


def _exports(job: JobSpec, site: Site) -> list[str]:
    variables = dict(job.environment)
    if job.is_on_ray:
        seconds = str(site.ray.cluster_wait_seconds)
        variables.setdefault("RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT", seconds)
    return [f"export {name}={quoted(value)}" for name, value in sorted(variables.items())]


def _agent(launcher: str, job: JobSpec, site: Site) -> tuple[str, ...]:
    if launcher == "torchrun":
        ranks, grace = str(job.ranks_per_node), str(job.grace_seconds)
        return (site.python, "-m", "launch.torchrun", ranks, grace)
    if launcher == "ray":
        return (site.python, "-m", "ray.scripts.scripts", "symmetric-run", "--address")
    return ()


def _preflight(job: JobSpec, site: Site) -> tuple[str, ...]:
    if job.kind != "train" or not site.preflight or job.config_path is None:
        return ()
    gpus = ("--gpus-per-node", str(job.gpus_per_node)) if job.gpus_per_node else ()
    seconds = ("--seconds", str(site.slurm.preflight_seconds))
    words = ("check", str(job.config_path), "--at-start", *seconds, *gpus)
    return (site.python, "-m", "pipeline.cli", *words)


def _step_options(job: JobSpec, site: Site) -> list[str]:
    if job.image is None or site.slurm.container != "pyxis":
        return []
    mounts = (f"{m.source}:{m.target}{':ro' if m.read_only else ''}" for m in job.mounts)
    return [
        f"--container-image={job.image}",
        *([f"--container-mounts={','.join(mounts)}"] if job.mounts else []),
        f"--container-workdir={job.work_dir}",
        "--no-container-mount-home",
    ]


def _inside(job: JobSpec, site: Site) -> list[str]:
    if job.image is None or site.slurm.container != "apptainer":
        return []
    mounts = (f"{m.source}:{m.target}{':ro' if m.read_only else ''}" for m in job.mounts)
    nvidia = ["--nv"] if job.gpus_per_node else []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *nvidia, *binds, "--pwd", str(job.work_dir), job.image]


def _tasks_per_node(job: JobSpec, slurm: SlurmSite) -> int:
    return job.ranks_per_node if job.kind == "train" and slurm.launcher == "srun" else 1


def _cpus_per_task(job: JobSpec, slurm: SlurmSite) -> int:
    return job.cpus_per_rank * (job.ranks_per_node // _tasks_per_node(job, slurm))


def _array(words: Iterable[str]) -> str:
    return f"({' '.join(quoted(word) for word in words)})"


def _plain(path: str) -> str:
    if _PLAIN_PATH.fullmatch(path) is None:
        raise UsageError(
            f"Slurm's directives cannot hold the path {path!r}",
            remedy="Give the folder a name without blanks, quotes, backslashes, # and %.",
        )
    return path
