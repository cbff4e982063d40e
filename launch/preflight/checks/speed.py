"""How fast this node writes to the run's storage, beside what a checkpoint takes."""

import os
import tempfile
import time
from collections.abc import Sequence

from launch.preflight.checks.storage import nearest_folder
from launch.preflight.finding import Answer, Finding, Situation
from pipeline.errors import ExitCode
from pipeline.plan.saving import checkpoint_bytes

NAME = "write speed"
_CHUNK = b"\0\1\2\3\4\5\6\7" * (1 << 17)
_LONGEST_SECONDS = 3.0
_MOST_BYTES = 256 << 20
# Step time is not known before a run: an hour between saves is what `auto` allows at most.
_LONGEST_INTERVAL = 3600.0


def check_speed(situation: Situation) -> Finding:
    """Writes and synchronises a file for at most three seconds; all nodes do so at a time."""
    wanted = min(_MOST_BYTES, max(len(_CHUNK), checkpoint_bytes(situation.config)))
    written, begin = 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=nearest_folder(situation.config)) as file:
        while written < wanted and time.perf_counter() - begin < _LONGEST_SECONDS:
            written += os.write(file.fileno(), _CHUNK)
        os.fsync(file.fileno())
    rate = written / 1e6 / max(1e-6, time.perf_counter() - begin)
    return Finding(
        name=NAME,
        state="ok",
        got=f"{rate:,.0f} MB/s",
        values={"mb_per_second": rate},
        exit_code=ExitCode.STORAGE,
    )


def compare_speed(situation: Situation, answers: Sequence[Answer]) -> Finding:
    """What all nodes wrote together, against the checkpoint's size and interval."""
    found = [(one.node, one.of(NAME)) for one in answers]
    rates = {node: one.values["mb_per_second"] for node, one in found if one and one.values}
    total = sum(rates.values())
    size = checkpoint_bytes(situation.config) / 1e6
    seconds = size / max(total, 1e-9)
    grace, minutes = situation.config.stop.grace_seconds, situation.config.checkpoint.every_minutes
    interval = 60.0 * minutes if minutes is not None else _LONGEST_INTERVAL
    expected = f"a checkpoint of {size:,.0f} MB within {interval:,.0f} s"
    finding = Finding(
        name=NAME,
        state="ok",
        expected=expected,
        got=f"{total:,.0f} MB/s from {len(rates)} node(s): {seconds:,.1f} s",
        exit_code=ExitCode.STORAGE,
        values={"mb_per_second": rates, "checkpoint_seconds": seconds},
    )
    if seconds > interval:
        return finding.worse(
            "fail", finding.got, "Use faster storage for runs_folder, or save less often."
        )
    if grace is not None and seconds > grace:
        return finding.worse(
            "warn",
            f"{finding.got}, longer than stop.grace_seconds = {grace:g}",
            "Raise the scheduler's grace period and stop.grace_seconds above it: as it is, a stop "
            "goes back to the last checkpoint.",
        )
    return finding
