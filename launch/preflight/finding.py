"""What a check says, what it may know, and the exit code that all checks together come to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.errors import ExitCode
from pipeline.place import Launch
from pipeline.plan.cluster import Cluster
from pipeline.run import RunConfig

State = Literal["ok", "warn", "fail", "skip"]
WORST_FIRST: tuple[State, ...] = ("fail", "warn", "ok", "skip")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The answer of one check."""

    name: str
    state: State
    expected: str = ""
    got: str = ""
    remedy: str = ""
    """The next thing to do, where something is wrong."""
    seconds: float = 0.0
    """What the check took."""
    nodes: tuple[str, ...] = ()
    """Machines that are to blame, by the scheduler's names; none if the fault is everybody's."""
    exit_code: ExitCode = ExitCode.CONFIG
    """What a failure means to the scheduler."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, for rank 0 to compare: plain JSON data."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Finding":
        """What `to_dict` gave, after a round trip through JSON."""
        code = ExitCode(record["exit_code"])
        return cls(**{**record, "nodes": tuple(record["nodes"]), "exit_code": code})

    def worse(self, state: State, got: str, remedy: str) -> "Finding":
        """The same check with a graver answer."""
        return replace(self, state=state, got=got, remedy=remedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """Everything that a check may know."""

    config: RunConfig
    launch: Launch
    node: str
    """This machine, by the scheduler's name."""
    ranks_here: int
    """Ranks that training will have on this machine."""
    cluster: Cluster | None = None
    """What the site promises of its machines, if it was told."""
    wanted_gpus: int | None = None
    """GPUs that every node has to show, if it was told."""
    note: Callable[[str], None] = lambda _words: None
    """Says what the check is at, for the message if it never ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Everything that one process found."""

    rank: int
    node: str
    findings: tuple[Finding, ...]

    def of(self, name: str) -> Finding | None:
        """Its finding of a check; None if it did not run it."""
        return next((one for one in self.findings if one.name == name), None)


Check = Callable[[Situation], Finding]
Comparison = Callable[[Situation, Sequence[Answer]], Finding]


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """One code for all: what no retry mends comes first, then bad machines, then storage."""
    codes = {one.exit_code for one in findings if one.state == "fail"}
    order = (ExitCode.CONFIG, ExitCode.PEER_LOST, ExitCode.STORAGE)
    return next((code for code in order if code in codes), ExitCode.DONE)


def bad_nodes(findings: Sequence[Finding]) -> list[str]:
    """Machines that a failure blames, in order; the scheduler should leave them out."""
    blamed = [
        node
        for one in findings
        if one.state == "fail" and one.exit_code == ExitCode.PEER_LOST
        for node in one.nodes
    ]
    return list(dict.fromkeys(blamed))
