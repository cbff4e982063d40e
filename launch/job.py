"""What a job is, whatever scheduler runs it: the one thing that every renderer starts from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.errors import ExitCode, UsageError

Kind = Literal["train", "prep", "probe", "conduct"]
# What Slurm, Kubernetes and DNS all accept as a part of their names, dots and case aside.
JOB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
VARIABLE_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
NEVER_AGAIN = (
    ExitCode.USAGE,
    ExitCode.DATA,
    ExitCode.CONFIG,
    ExitCode.NUMERICS,
    ExitCode.NO_PROGRESS,
)
"""What no further start mends: schedulers are told to leave such a job ended."""
EACH = "{}"
"""Stands in a job's words for what differs between the jobs of an array."""
_DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::([0-5]?\d))?(?::([0-5]?\d))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A folder of the machines that a container sees."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """A job: words for `jepa`, and what the machines must have and for how long."""

    name: str
    kind: Kind
    argv: tuple[str, ...]
    """What follows `jepa`: `("train", "/shared/runs/a/jobs/a.yaml", "--or-resume")`. In the jobs of
    an array `{}` stands for the value of each."""
    work_dir: Path
    """Current folder of the job; relative paths of a configuration begin here."""
    run_dir: Path | None = None
    """The run's folder, absolute; where a job without a run, such as preparation, keeps its logs
    too."""
    config_path: Path | None = None
    """The configuration that `argv` names, frozen when the job was made."""
    config_text: str | None = None
    """Its content, for schedulers whose nodes do not see `config_path`."""
    nodes: int = 1
    min_nodes: int | None = None
    """Fewer machines than `nodes` are taken, down to this number, if no more can be had; None takes
    no fewer."""
    node_counts: tuple[int, ...] = ()
    """Numbers of nodes that share the global batch evenly; empty if any number will do."""
    gpus_per_node: int = 0
    ranks_per_node: int = 1
    """Processes of a node: one for each GPU, on machines without any as many as wanted."""
    cpus_per_rank: int = 1
    memory_gib: int | None = None
    """Memory of a node, or what the scheduler gives by default."""
    time_limit_seconds: int = 24 * 3600
    grace_seconds: int = 300
    """From the request to save until the kill: one step, the longest save and 60 s."""
    environment: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    """Container image; None runs on the machines as they are."""
    mounts: tuple[Mount, ...] = ()
    each: tuple[str, ...] = ()
    """One job of an array for each of these values, put in the place of `{}`."""

    def __post_init__(self) -> None:
        _must_match(JOB_NAME, self.name, "a job's name of letters, digits, `.`, `_` and `-`")
        for name in self.environment:
            _must_match(VARIABLE_NAME, name, "the name of an environment variable")
        texts = [*self.argv, *self.environment.values(), *self.each, str(self.work_dir)]
        texts += [text for mount in self.mounts for text in (mount.source, mount.target)]
        if any("\0" in text for text in texts):
            raise UsageError("expected texts without NUL characters in a job's words")
        for unit in ("nodes", "least_nodes", "ranks_per_node", "cpus_per_rank", "grace_seconds"):
            if getattr(self, unit) < 1:
                raise UsageError(f"expected {unit} of at least 1, got {getattr(self, unit)}")
        if self.least_nodes > self.nodes:
            raise UsageError(f"expected at most {self.nodes} min_nodes, got {self.min_nodes}")
        if self.grace_seconds >= self.time_limit_seconds:
            raise UsageError(
                f"a grace of {self.grace_seconds} s does not fit in a time limit of "
                f"{self.time_limit_seconds} s",
                remedy="Give --time more, or set grace_seconds of the site file to less.",
            )

    @property
    def least_nodes(self) -> int:
        """Fewest machines that it runs on."""
        return self.nodes if self.min_nodes is None else self.min_nodes

    @property
    def is_array(self) -> bool:
        """Whether it is several jobs that differ in one value."""
        return bool(self.each)

    @property
    def is_on_ray(self) -> bool:
        """Whether its words run on the first node of a Ray cluster over all its nodes."""
        return self.kind != "train" and self.nodes > 1


def parse_duration(text: str) -> int:
    """Seconds of a time as Slurm writes it: `90` (minutes), `30:00`, `24:00:00`, `2-12:00:00`.

    Raises:
        UsageError: It is none, or zero.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"expected a time such as 24:00:00 or 2-12:00:00, got {text!r}")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 1:
        hours, minutes, seconds = 0, numbers[0], 0
    else:
        hours, minutes, seconds = (0, *numbers)[-3:]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UsageError(f"expected a time above zero, got {text!r}")
    return total


def duration_text(seconds: int) -> str:
    """The same time as Slurm writes it: `1-02:03:04`."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}-{clock}" if days else clock


def _must_match(pattern: str, text: str, what: str) -> None:
    # `$` and `match` would let a line break at the end through.
    if re.fullmatch(pattern, text) is None:
        raise UsageError(f"expected {what}, got {text!r}")
