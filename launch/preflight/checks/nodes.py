"""Whether all processes of the job came."""

from launch.preflight.finding import Finding
from pipeline.errors import ExitCode
from pipeline.meeting import name_ranks

NAME = "nodes"


def nodes_finding(world_size: int, missing: list[int], hosts: dict[int, str]) -> Finding:
    """Who is missing, by rank and machine."""
    finding = Finding(
        name=NAME,
        state="ok",
        expected=f"{world_size} process(es)",
        got=f"{world_size - len(missing)} came",
        exit_code=ExitCode.PEER_LOST,
    )
    if not missing:
        return finding
    # A machine of which others came is up; it is its process that is lost.
    nodes = tuple(dict.fromkeys(hosts[rank] for rank in missing if rank in hosts))
    return Finding(
        name=NAME,
        state="fail",
        expected=finding.expected,
        got=f"these never came: {name_ranks(missing, hosts)}",
        remedy="Look at the logs of those machines; leave them out if they do not start.",
        nodes=nodes,
        exit_code=ExitCode.PEER_LOST,
    )
