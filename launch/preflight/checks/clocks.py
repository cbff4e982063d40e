"""Whether the nodes agree about the time."""

from collections.abc import Sequence
from dataclasses import replace

from launch.preflight.finding import Answer, Finding, Situation

NAME = "clocks"
# What is measured holds the message's way, which takes a second at most on a busy machine.
_WARN_SECONDS, _FAIL_SECONDS = 2.0, 60.0


def clock_finding(offset_seconds: float) -> Finding:
    """This node's clock beside rank 0's, as it was when rank 0's word came."""
    return Finding(name=NAME, state="ok", values={"offset_seconds": offset_seconds})


def compare_clocks(_situation: Situation, answers: Sequence[Answer]) -> Finding:
    """Leases, logs and time limits go by these clocks."""
    offsets = {
        one.node: float(finding.values["offset_seconds"])
        for one in answers
        if (finding := one.of(NAME)) is not None
    }
    largest = max(map(abs, offsets.values()), default=0.0)
    finding = Finding(
        name=NAME,
        state="ok" if len(offsets) > 1 else "skip",
        expected=f"within {_WARN_SECONDS:g} s of rank 0's",
        got=f"at most {largest:.2f} s apart" if len(offsets) > 1 else "one process",
        values={"offset_seconds": offsets},
    )
    off = {node: offset for node, offset in offsets.items() if abs(offset) > _WARN_SECONDS}
    if not off:
        return finding
    words = ", ".join(f"{node} by {offset:+.1f} s" for node, offset in list(off.items())[:8])
    worse = finding.worse(
        "fail" if largest > _FAIL_SECONDS else "warn", words, "Start chrony or ntpd there."
    )
    return replace(worse, nodes=tuple(off))
