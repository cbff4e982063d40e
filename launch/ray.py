"""`jepa launch ray`: the same training under Ray Train, as a thin adapter.

Ray places the workers, starts them all or none and starts them again; each worker starts one rank
as a process of its own, exactly as the other launchers do. Inside a worker the loop could not be
itself: Ray calls it in a thread, where Python takes no signals, and turns exit codes into pickled
exceptions. So the loop never imports Ray, and its losses are those of every other launcher.

What Ray calls a failure is mapped to our resume: ranks that failed are started again with
`--or-resume` while Ray's failure policy permits; codes that say `never again` (78, 93 and others)
and `saved` (75) are results, not failures.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from launch.job import NEVER_AGAIN
from launch.stopped import is_stopped_for_good
from pipeline.cluster import local_ray
from pipeline.config.load import load_config
from pipeline.environment import free_port
from pipeline.errors import ExitCode, JepaError, PeerLostError, UsageError
from pipeline.run import RunConfig
from pipeline.track.folder import STOP_FILE

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_POLL_SECONDS = 0.5
_NOT_FAILED = (ExitCode.DONE, ExitCode.SAVED_RUN_AGAIN, *NEVER_AGAIN)


@dataclass(frozen=True, kw_only=True, slots=True)
class RayWish:
    """Where the ranks run, and how often they may be started again."""

    ranks: int = 1
    """Ranks, one worker of Ray each."""
    address: str | None = None
    """host:port of a running cluster, `auto` for the one that this process is in; by default a
    private one on this machine."""
    cpus_only: bool = False
    """Ask for no GPU; by default every rank gets one if the cluster has any."""
    cpus_per_rank: float = 1.0
    """Processors of each rank."""
    max_failures: int = 3
    """Starts after a failure; what the run saved is not done again."""
    stopped_is_done: bool = False
    """End with 0, not 75, if `jepa stop` or the run's own time limit ended it: for schedulers that
    start again whatever ended otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankWords:
    """What a worker of Ray starts; crosses from the driver to the workers."""

    arguments: tuple[str, ...]
    """What follows the interpreter."""
    work_dir: str
    """Folder of relative paths; Ray starts workers in one of its own."""
    variables: tuple[tuple[str, str], ...] = ()


def ray(
    config: Path,
    *overrides: Annotated[str, Parameter(help="key=value over the file, e.g. seed=7.")],
    wish: Annotated[RayWish | None, Parameter(name="*")] = None,
) -> ExitCode:
    """Train under Ray Train's TorchTrainer, on this machine or a running Ray cluster.

    Continues the run if it has checkpoints. SIGTERM and Ctrl-C ask it to save and stop, as
    `jepa stop` does. All machines must see the run's folder.

    Args:
        config: YAML file of the run.
        overrides: key=value laid over the file; list items by position, as stages.0.steps=100.
        wish: Where the ranks run.
    """
    chosen = wish or RayWish()
    if chosen.ranks < 1 or chosen.max_failures < 0:
        raise UsageError(
            f"expected --ranks of at least 1 and --max-failures of at least 0, got {chosen.ranks} "
            f"and {chosen.max_failures}"
        )
    run = load_config(config, RunConfig, overrides).config
    words = ("-m", "pipeline.cli", "train", str(config.resolve()), *overrides, "--or-resume")
    # Variables of this process, which a cluster's workers, started by others, do not have.
    passed = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")
    variables = tuple((name, value) for name, value in os.environ.items() if name in passed)
    rank = RankWords(arguments=words, work_dir=str(Path.cwd()), variables=variables)
    cpus = None if chosen.address else chosen.ranks * chosen.cpus_per_rank + 1
    with local_ray(cpus, chosen.address) as library:
        has_gpus = bool(library.cluster_resources().get("GPU")) and not chosen.cpus_only
        return ExitCode(_fit(run, rank, chosen, use_gpu=has_gpus))


def train_rank(rank: RankWords) -> int:
    """What every worker of Ray runs: starts its rank, waits, and agrees with the others.

    Returns:
        The run's exit code, the same on all workers.

    Raises:
        PeerLostError: The ranks failed in a way that another start may mend.
    """
    import torch.distributed as dist  # noqa: PLC0415 - the group that Ray has made here

    # Ray's own store listens at MASTER_PORT; our ranks meet beside it.
    meeting = [free_port() if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(meeting, src=0)
    env = {**os.environ, **dict(rank.variables), "MASTER_PORT": str(meeting[0])}
    # Ends with this worker, which Ray may kill: a rank without it would hold the run's lease.
    command = [sys.executable, "-m", "launch.ray_rank", str(os.getpid()), *rank.arguments]
    status = subprocess.run(command, env=env, cwd=rank.work_dir, check=False).returncode
    codes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(codes, status if status >= 0 else int(ExitCode.PEER_LOST))
    code = verdict(codes)
    if code not in _NOT_FAILED:
        raise PeerLostError(f"the ranks ended with exit code {code} ({codes})")
    return code


def verdict(codes: Sequence[int]) -> int:
    """One code for all ranks: of the cause, where others only lost it; 75 if any was saved."""
    fine = (ExitCode.DONE, ExitCode.SAVED_RUN_AGAIN)
    failed = [code for code in codes if code not in fine]
    causes = [code for code in failed if code != ExitCode.PEER_LOST]
    return (causes or failed or [max(codes)])[0]


def _fit(run: RunConfig, rank: RankWords, wish: RayWish, *, use_gpu: bool) -> int:
    """Runs the trainer beside this thread, which stays free to hear signals."""
    from ray import train  # noqa: PLC0415 - imported after pipeline.cluster has confined it
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415

    resources = {"CPU": wish.cpus_per_rank, **({"GPU": 1} if use_gpu else {})}
    trainer = TorchTrainer(
        lambda: train_rank(rank),
        # The group that only agrees on a port and on exit codes; training has its own.
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=wish.ranks, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            name=run.name,
            storage_path=str((run.run_dir / "ray").resolve()),
            failure_config=train.FailureConfig(max_failures=wish.max_failures),
        ),
    )
    run.run_dir.mkdir(parents=True, exist_ok=True)
    fitting, stop_file = _Fit(trainer.fit), run.run_dir / STOP_FILE
    sys.stdout.write(
        f"{wish.ranks} ranks under Ray Train; `jepa status {run.run_dir}` shows them\n"
    )
    sys.stdout.flush()
    with _told_to_stop() as told:
        fitting.start()
        while fitting.is_alive():
            fitting.join(timeout=_POLL_SECONDS)
            if told:
                # Again and again: a run that is just starting takes an old one away.
                stop_file.touch()
    code = fitting.code()
    is_wanted = wish.stopped_is_done and code == ExitCode.SAVED_RUN_AGAIN and not told
    return ExitCode.DONE if is_wanted and is_stopped_for_good(run.run_dir) else code


class _Fit(threading.Thread):
    """`fit` in a thread of its own: in the main one Ray would end the run at Ctrl-C, unsaved."""

    def __init__(self, fit: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._fit = fit
        self._result: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        from ray.train import TrainingFailedError  # noqa: PLC0415

        try:
            self._result = self._fit()
        except (TrainingFailedError, RuntimeError, OSError, ValueError) as error:
            self._error = error

    def code(self) -> int:
        """What rank 0 returned.

        Raises:
            PeerLostError: Ray gave up starting the ranks again.
        """
        if self._error is not None:
            lines = [line for line in str(self._error).splitlines() if line.strip()]
            said = next((line for line in reversed(lines) if "exit code" in line), "")
            raise PeerLostError(
                f"Ray Train gave up: {said.strip() or ' '.join(lines[-1:]).strip()}",
                remedy="`jepa status RUN` says which rank failed and why; the same command "
                "continues from the last checkpoint.",
            ) from self._error
        if self._result is None or self._result.return_value is None:
            raise JepaError("Ray Train ended without a word of rank 0")
        return int(self._result.return_value)


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """Signals that came: they become the run's stop file, which every machine sees."""
    told: list[int] = []

    def note(number: int, _frame: object) -> None:
        told.append(number)
        os.write(2, b"asked to stop: the run saves after the step it is in\n")

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
