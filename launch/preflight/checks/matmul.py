"""How fast each device multiplies matrices, beside the median of all others."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from launch.preflight.finding import Answer, Finding, Situation
from pipeline.errors import ExitCode
from pipeline.track.peaks import measured_tflops

NAME = "matrix products"
# GPUs of one kind differ by a few per cent; ranks on one CPU share its cores and its moods.
_SLOW_GPU, _SLOW_CPU = 0.85, 0.5
_CPU_EDGE = 768


def check_matmul(situation: Situation) -> Finding:
    """TFLOP/s of a large product on every device that is this process's to measure."""
    if torch.cuda.is_available():
        visible, local = torch.cuda.device_count(), situation.launch.local_rank
        alone_here = situation.launch.local_world_size == 1
        numbers = range(visible) if alone_here else [min(local, visible - 1)]
        rates = {
            f"GPU {number}": measured_tflops(torch.device("cuda", number), torch.bfloat16)
            for number in numbers
        }
    else:
        rates = {"CPU": measured_tflops(torch.device("cpu"), torch.float32, edge=_CPU_EDGE)}
    got = ", ".join(f"{name} {rate:,.2f} TFLOP/s" for name, rate in rates.items())
    return Finding(name=NAME, state="ok", got=got, values=rates, exit_code=ExitCode.PEER_LOST)


def compare_matmul(_situation: Situation, answers: Sequence[Answer]) -> Finding:
    """Each device against the median of the others."""
    rates = {
        (one.node, one.rank, device): float(rate)
        for one in answers
        if (finding := one.of(NAME)) is not None
        for device, rate in finding.values.items()
    }
    on_gpu = any(device.startswith("GPU") for _, _, device in rates)
    limit = _SLOW_GPU if on_gpu else _SLOW_CPU
    slow: dict[tuple[str, int, str], float] = {}
    for key, rate in rates.items():
        others = [other for name, other in rates.items() if name != key]
        if others and rate < limit * statistics.median(others):
            slow[key] = rate
    middle = statistics.median(rates.values()) if rates else 0.0
    finding = Finding(
        name=NAME,
        state="ok" if rates else "skip",
        expected=f"each at least {limit:.0%} of the others' median",
        got=f"median {middle:,.2f} TFLOP/s of {len(rates)} device(s)",
        exit_code=ExitCode.PEER_LOST,
        values={"tflops": middle},
    )
    if not slow:
        return finding
    words = [
        f"{device} of {node} (rank {rank}) {rate:,.2f}"
        for (node, rank, device), rate in slow.items()
    ]
    got = f"{', '.join(words[:8])} TFLOP/s beside a median of {middle:,.2f}"
    # On a CPU a neighbour's load looks the same and is gone a moment later.
    worse = finding.worse(
        "fail" if on_gpu else "warn", got, "Leave those nodes out and look at heat and power."
    )
    return replace(worse, nodes=tuple(dict.fromkeys(node for node, _, _ in slow)))
