"""Whether this node's GPUs are there, have free memory, and report no errors."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from launch.preflight.checks.xid import grave_xids, kernel_log, uptime_seconds
from launch.preflight.finding import Answer, Finding, Situation
from pipeline.errors import ExitCode
from pipeline.nvidia import GpuHealth, gpu_health

NAME = "gpus"
# Another process's leftovers: a context takes about half a GiB, a training rank takes all.
_FREE_SHARE = 0.9


def check_gpus(situation: Situation) -> Finding:
    """GPUs that this process sees, their memory, memory errors, heat and Xid messages."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    finding = Finding(
        name=NAME,
        state="ok",
        expected="every GPU visible, free and without errors",
        got=f"{visible} GPU(s)",
        exit_code=ExitCode.PEER_LOST,
        values={"visible": visible},
    )
    if visible == 0:
        return replace(finding, state="skip", got="no GPU here")
    names = sorted({torch.cuda.get_device_name(number) for number in range(visible)})
    finding = replace(finding, got=f"{visible} × {', '.join(names)}")
    troubles = [
        f"GPU {number}: {trouble}"
        for number in range(visible)
        for trouble in _troubles(_health(number))
    ]
    troubles += [f"Xid {words}" for words in grave_xids(kernel_log(), uptime_seconds())]
    if not troubles:
        return finding
    worse = finding.worse(
        "fail",
        "; ".join(troubles),
        "Leave the node out; end leftover processes (`nvidia-smi`), reset or replace the GPU.",
    )
    return replace(worse, nodes=(situation.node,))


def compare_gpus(situation: Situation, answers: Sequence[Answer]) -> Finding:
    """Every node shows as many GPUs as asked for, or as many as most nodes show."""
    found = [(one.node, one.of(NAME)) for one in answers]
    visible = {node: int(one.values["visible"]) for node, one in found if one and one.values}
    counts = list(visible.values())
    wanted = situation.wanted_gpus
    if wanted is None or (wanted and not any(counts)):
        # A CPU cluster names its ranks a node by the same option.
        wanted = max(set(counts), key=counts.count, default=0)
    few = sorted(node for node, count in visible.items() if count < wanted)
    finding = Finding(
        name="gpus a node",
        state="ok" if wanted else "skip",
        expected=f"{wanted} on every node",
        got=", ".join(f"{count} on {counts.count(count)} node(s)" for count in sorted(set(counts))),
        exit_code=ExitCode.PEER_LOST,
    )
    if not few:
        return finding
    got = ", ".join(f"{visible[node]} on {node}" for node in few)
    worse = finding.worse("fail", got, "Leave those nodes out, or ask for fewer GPUs a node.")
    return replace(worse, nodes=tuple(few))


def _health(number: int) -> GpuHealth | None:
    return gpu_health(str(torch.cuda.get_device_properties(number).uuid))


def _troubles(health: GpuHealth | None) -> list[str]:
    if health is None:
        return []
    found = []
    if health.free_gib < _FREE_SHARE * health.total_gib:
        found.append(f"only {health.free_gib:.1f} of {health.total_gib:.1f} GiB are free")
    if health.uncorrected_ecc:
        found.append(f"{health.uncorrected_ecc} uncorrected memory errors")
    if health.remapping_failed:
        found.append("a broken row of memory could not be replaced")
    if health.remapping_pending:
        found.append("a broken row of memory waits for a reset")
    if health.slowdowns:
        found.append(f"slows itself down ({', '.join(health.slowdowns)})")
    return found
