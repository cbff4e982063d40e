"""Whether a rank may have as many files open as it needs."""

import resource

from launch.preflight.finding import Finding, Situation

NAME = "open files"
# Interpreter and libraries, MLflow's process, checkpoint files, and a loader's shards.
_BASE = 512
_PER_WORKER = 32


def check_open_files(situation: Situation) -> Finding:
    """The limit against connections to all ranks, loader workers, shards and libraries."""
    config, launch = situation.config, situation.launch
    needed = _BASE + 2 * launch.world_size + _PER_WORKER * config.data.workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    finding = Finding(name=NAME, state="ok", expected=f"at least {needed:,}", got=shown)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return finding
    how = f"ulimit -n {needed}" if hard >= needed else "limits.conf or the container's settings"
    return finding.worse("fail", shown, f"Raise the limit of open files: {how}.")
