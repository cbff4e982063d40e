"""Whether the ports that a run listens on are free on the master's node."""

import socket

from launch.preflight.finding import Finding, Situation
from pipeline.errors import ExitCode

NAME = "ports"


def check_ports(situation: Situation) -> Finding:
    """The meeting point, which is bound here already, and the metrics endpoint's port."""
    launch, prometheus = situation.launch, situation.config.track.prometheus
    met = [f"{launch.master_address}:{launch.master_port}"] if launch.launcher != "alone" else []
    taken = []
    if prometheus.enabled:
        address = (prometheus.host, prometheus.port)
        if not _is_free(address):
            taken.append(f"{prometheus.host}:{prometheus.port} (track.prometheus)")
        else:
            met.append(f"{prometheus.host}:{prometheus.port}")
    if taken:
        return Finding(
            name=NAME,
            state="warn",
            expected="free",
            got=f"taken: {', '.join(taken)}",
            remedy="Set track.prometheus.port; as it is the run goes on without its endpoint.",
            exit_code=ExitCode.PEER_LOST,
            nodes=(situation.node,),
        )
    return Finding(name=NAME, state="ok", expected="free", got=", ".join(met) or "none needed")


def _is_free(address: tuple[str, int]) -> bool:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as probe:
        # As the server does: a port that was used a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True
