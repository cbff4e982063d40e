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
_NO_GPU = (
    "Look at the driver (`nvidia-smi`): training would go on, on CPUs. Where that is meant, "
    "torch's CPU build ends this warning."
)


def check_gpus(situation: Situation) -> Finding:
    """GPUs that this process sees, their memory, memory errors, heat and Xid messages."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(number) for number in range(visible)]
    finding = Finding(
        name=NAME,
        state="ok",
        expected="every GPU visible, free and without errors",
        got=f"{visible} × {', '.join(sorted({gpu.name for gpu in found}))}",
        exit_code=ExitCode.PEER_LOST,
        values={"visible": [str(gpu.uuid) for gpu in found]},
    )
    if visible == 0:
        return replace(finding, state="skip", got="no GPU here")
    troubles = [
        f"GPU {number}: {trouble}"
        for number, gpu in enumerate(found)
        for trouble in _troubles(gpu_health(str(gpu.uuid)))
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
    seen: dict[str, set[str]] = {}
    for one in answers:
        # A scheduler may show each process of a node a GPU of its own and no other.
        if (finding := one.of(NAME)) is not None and finding.values:
            seen.setdefault(one.node, set()).update(finding.values["visible"])
    visible = {node: len(gpus) for node, gpus in seen.items()}
    counts = list(visible.values())
    wanted, on_cpus = situation.wanted_gpus, not any(counts)
    if wanted is None or on_cpus:
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
    if on_cpus and situation.wanted_gpus and torch.version.cuda is not None:
        return finding.worse("warn", f"none, {situation.wanted_gpus} asked for", _NO_GPU)
    if not few:
        return finding
    got = ", ".join(f"{visible[node]} on {node}" for node in few)
    worse = finding.worse("fail", got, "Leave those nodes out, or ask for fewer GPUs a node.")
    return replace(worse, nodes=tuple(few))


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
