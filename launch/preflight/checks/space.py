"""Whether the run's checkpoints will fit on its storage."""

import shutil

from launch.preflight.checks.storage import nearest_folder
from launch.preflight.finding import Finding, Situation
from pipeline.checkpoint.layout import checkpoints_dir, list_commits
from pipeline.errors import ExitCode
from pipeline.plan.saving import checkpoint_bytes, kept_checkpoints

NAME = "space"
# Records, logs and the files of other tools; and a save needs its files beside those it replaces.
_RESERVE_BYTES = 256 << 20


def check_space(situation: Situation) -> Finding:
    """Free space against checkpoints × their size, less those that lie there already."""
    config = situation.config
    size, most = checkpoint_bytes(config), kept_checkpoints(config)
    there = min(len(list_commits(config.run_dir)), most)
    free = shutil.disk_usage(nearest_folder(config)).free
    needed = size * (most - there) + _RESERVE_BYTES
    # The next two saves must fit, or the run ends at one of them.
    least = 2 * size + _RESERVE_BYTES
    expected = f"{_size(needed)} for {most - there} more checkpoints of {_size(size)}"
    finding = Finding(
        name=NAME,
        state="ok",
        expected=expected,
        got=f"{_size(free)} free",
        exit_code=ExitCode.STORAGE,
        values={"free_bytes": free, "needed_bytes": needed},
    )
    if free < least:
        return finding.worse(
            "fail", finding.got, f"Free space below {checkpoints_dir(config.run_dir)}."
        )
    if free < needed:
        return finding.worse(
            "warn",
            finding.got,
            "Free space, or keep fewer: checkpoint.keep_last, checkpoint.keep_every_steps.",
        )
    return finding


def _size(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:,.1f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:,.1f} MiB"
