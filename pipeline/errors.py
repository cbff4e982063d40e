"""Every error a user can meet: its exit code and one line that says what to do.

Schedulers read the exit codes (Slurm requeue rules, Kubernetes failure policies), so a code never
changes its meaning. The words follow sysexits where sysexits has one.
"""

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What the process that ran `jepa` tells the scheduler that started it."""

    DONE = 0
    USAGE = 2
    DATA = 65
    BUG = 70
    STORAGE = 74
    SAVED_RUN_AGAIN = 75
    PEER_LOST = 76
    CONFIG = 78
    NUMERICS = 79
    NO_PROGRESS = 93


INTERRUPTED = 130
"""The shell's own code for a process that was ended from the keyboard."""


class JepaError(Exception):
    """Base of all errors with a message for a person.

    Args:
        message: What was expected and what was found instead, with the object's name.
        remedy: The next thing to do; one line. Defaults to the class's own remedy.
    """

    exit_code: ExitCode = ExitCode.BUG
    remedy: str = "This is a fault of jepa itself: please report it with the log of this run."

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy


class UsageError(JepaError):
    """A wrong flag, argument or path on the command line."""

    exit_code = ExitCode.USAGE
    remedy = "See `jepa --help` and `jepa COMMAND --help`."


class ConfigError(JepaError):
    """A run's configuration is wrong; starting it again cannot help."""

    exit_code = ExitCode.CONFIG
    remedy = "Correct the configuration; `jepa config schema` lists every key."


class DataError(JepaError):
    """Videos or shards are damaged beyond what the run tolerates."""

    exit_code = ExitCode.DATA
    remedy = "Look at RUN/quarantine.jsonl, mend or remove those videos, then resume."
    faults: tuple[Any, ...] = ()
    """The bad samples that caused it, if it was samples."""


class StorageError(JepaError):
    """A file system refused a read or a write."""

    exit_code = ExitCode.STORAGE
    remedy = (
        "Check free space and permissions of the folder named above, then try again; "
        "`jepa resume RUN` continues a run."
    )


class CheckpointError(JepaError):
    """A checkpoint is missing, damaged or belongs to something else; a person has to look."""

    exit_code = ExitCode.CONFIG
    remedy = "List what there is with `jepa ckpt ls RUN` and check it with `jepa ckpt verify RUN`."


class PeerLostError(JepaError):
    """Another rank died, hung or never came."""

    exit_code = ExitCode.PEER_LOST
    remedy = "Look at the log of the rank named above; `jepa resume RUN` continues."


class NumericsError(JepaError):
    """Loss or gradients are not finite too often to go on."""

    exit_code = ExitCode.NUMERICS
    remedy = (
        "Lower the learning rate in RUN/config.yaml, then `jepa resume RUN --step N` from a step "
        "before the trouble: `jepa ckpt ls RUN` lists them."
    )


class NoProgressError(JepaError):
    """The run was started several times and never came past its last checkpoint."""

    exit_code = ExitCode.NO_PROGRESS
    remedy = "Read the last errors in `jepa status RUN` before starting it again."
