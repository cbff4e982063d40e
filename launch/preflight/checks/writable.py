"""Whether the run's folder can be written to from this node."""

import os
import tempfile

from launch.preflight.checks.storage import nearest_folder
from launch.preflight.finding import Finding, Situation
from pipeline.errors import ExitCode

NAME = "run folder"


def check_writable(situation: Situation) -> Finding:
    """Makes, synchronises, renames and removes a small file where checkpoints will lie."""
    folder = nearest_folder(situation.config)
    expected = f"{folder} can be written to"
    try:
        with tempfile.TemporaryDirectory(prefix=".jepa-check-", dir=folder) as name:
            handle = os.open(f"{name}/probe", os.O_CREAT | os.O_WRONLY, 0o644)
            try:
                os.write(handle, b"jepa")
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(f"{name}/probe", f"{name}/renamed")  # noqa: PTH105 - what a save does
    except OSError as error:
        return Finding(
            name=NAME,
            state="fail",
            expected=expected,
            got=f"{error.strerror or error} ({folder})",
            remedy="Mount the storage on this node, correct its permissions, or set runs_folder.",
            exit_code=ExitCode.STORAGE,
            nodes=(situation.node,),
        )
    return Finding(name=NAME, state="ok", expected=expected, got="written, renamed and removed")
