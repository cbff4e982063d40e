"""Whether shared memory holds what the loader workers of this node keep ready."""

import shutil

from launch.preflight.finding import Finding, Situation
from pipeline.data.blocks import SHARED_MEMORY
from pipeline.errors import ExitCode
from pipeline.plan.loading import ready_bytes

NAME = "shared memory"


def check_shared_memory(situation: Situation) -> Finding:
    """What is free, against the micro-batches that all loader workers of this node keep."""
    needed = ready_bytes(situation.config, situation.ranks_here)
    expected = f"{needed / 2**20:,.0f} MiB for {situation.ranks_here} rank(s)"
    if not SHARED_MEMORY.is_dir():
        return Finding(name=NAME, state="skip", expected=expected, got=f"no {SHARED_MEMORY}")
    free = shutil.disk_usage(SHARED_MEMORY).free
    finding = Finding(
        name=NAME,
        state="ok",
        expected=expected,
        got=f"{free / 2**20:,.0f} MiB free",
        exit_code=ExitCode.STORAGE,
    )
    if free >= needed:
        return finding
    return finding.worse(
        "fail",
        finding.got,
        "Use fewer data.workers, a smaller data.prefetch, or a larger /dev/shm (a memory-backed "
        "emptyDir in Kubernetes, --shm-size of a container).",
    )
