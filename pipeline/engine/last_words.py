"""How a rank that ends badly is heard: a file of its own, and rank 0 puts all of them together."""

import re
import time
from pathlib import Path

import torch

from pipeline.engine.hang import Watchdog
from pipeline.environment import Launch
from pipeline.errors import INTERRUPTED, ConfigError, ExitCode, JepaError, PeerLostError
from pipeline.run import RunConfig
from pipeline.stages import place_of_step
from pipeline.track.faults import RankFault, read_faults, write_fault
from pipeline.track.lease import OwnerError

# How gloo, NCCL and the store word the loss of a peer; torch has no class of error for it.
_PEER_WORDS = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out",
    "remote process exited",
    "nccl",
    "gloo",
)
_PLACES = re.compile(r"\[/[^\]\s]*:\d+\] ")
_GUESSES = re.compile(r" This is typically caused by .*", re.DOTALL)
_SMALLER = (
    "Set a smaller micro_batch for that stage, activation_checkpointing=auto, or a higher "
    "zero.stage: `jepa plan` estimates what fits."
)
# The rank that failed writes its file before it closes its connections.
_PATIENCE_SECONDS = 3.0


def as_peer_loss(error: BaseException, launch: Launch) -> PeerLostError | None:
    """The error to report if `error` is a library's way of saying that another rank is gone."""
    if not isinstance(error, RuntimeError):
        return None
    if not any(word in str(error).lower() for word in _PEER_WORDS):
        return None
    # Without the places in gloo's source and its guesses: what is known is who lost whom.
    told = _GUESSES.sub("", _PLACES.sub("", str(error))).strip()
    return PeerLostError(
        f"Rank {launch.rank} of {launch.world_size} lost its peers: {told}",
        remedy="`jepa status RUN` says which rank was the first to fail, on which host and why; "
        "`jepa resume RUN` continues.",
    )


def as_memory_full(
    error: BaseException, config: RunConfig, step: int, *, is_first: bool
) -> JepaError | None:
    """The error to report if a GPU's memory ran out.

    Args:
        error: What ended the step.
        config: The run.
        step: Which step that was.
        is_first: No step of its stage has been taken since this start. Then none ever will be;
            later another start may get further.
    """
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    stage = place_of_step(config.stages, min(max(step, 1), config.num_steps)).stage
    words = (
        f"Stage {stage.name} with micro_batch {stage.micro_batch} ran out of this GPU's memory at "
        f"step {step}: {str(error).splitlines()[0]}"
    )
    return (ConfigError if is_first else JepaError)(words, remedy=_SMALLER)


class LastWords:
    """Where this rank leaves its last word; nowhere before it is known that the run is ours."""

    def __init__(self, launch: Launch, watchdog: Watchdog) -> None:
        self._launch, self._watchdog = launch, watchdog
        self._run_dir: Path | None = None
        self._attempt = 0

    def attach(self, run_dir: Path, attempt: int) -> None:
        """The run is ours from here on."""
        self._run_dir, self._attempt = run_dir, attempt

    def leave(self, error: BaseException) -> None:
        """Writes why this rank ends."""
        # A run that was taken over is another job's: not even a last word belongs there.
        if self._run_dir is None or isinstance(error, OwnerError):
            return
        phase, step = self._watchdog.place
        write_fault(
            self._run_dir,
            RankFault(
                attempt=self._attempt,
                rank=self._launch.rank,
                reason=_reason(error),
                kind=type(error).__name__,
                exit_code=_code(error),
                phase=phase,
                step=step,
            ),
        )

    def collect(self, error: BaseException) -> tuple[RankFault, ...]:
        """All ranks' last words of this attempt, the cause last; waits for it if need be."""
        if self._run_dir is None or isinstance(error, OwnerError):
            return ()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            faults = read_faults(self._run_dir, self._attempt)
            known = not isinstance(error, PeerLostError) or any(not f.is_echo for f in faults)
            if known or time.monotonic() > deadline:
                return faults
            time.sleep(0.1)


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C was pressed twice: ended at once, unsaved"
    return f"{type(error).__name__}: {error}"


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, JepaError) else ExitCode.BUG
