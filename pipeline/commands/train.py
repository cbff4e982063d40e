"""`jepa train` and `jepa resume`."""

import os
import sys
from pathlib import Path

from rich.console import Console

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import commit_of_step
from pipeline.commands import ConfigPath, Overrides
from pipeline.config.load import load_config
from pipeline.environment import Launch, free_port, prepare_libraries, read_launch
from pipeline.errors import CheckpointError, ExitCode, PeerLostError, UsageError
from pipeline.run import RunConfig
from pipeline.track.folder import CONFIG_FILE

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


def train(
    config: ConfigPath,
    *overrides: Overrides,
    ranks: int | None = None,
    dry_run: bool = False,
    or_resume: bool = False,
) -> ExitCode:
    """Train a run from its configuration.

    Starts on one rank, on `--ranks N` of this machine, or as one rank of torchrun or srun.

    Args:
        config: YAML file of the run.
        overrides: key=value laid over the file; list items by position, as stages.0.steps=100.
        ranks: Ranks to start on this machine, one for each GPU where there are any.
        dry_run: Check configuration and data, train nothing.
        or_resume: Continue the run if it has checkpoints already, which lets a job scheduler
            start and restart it with the same command.
    """
    run = load_config(config, RunConfig, overrides).config
    if dry_run:
        return _check(run, ranks or read_launch().world_size)
    if or_resume and _newest_step(run.run_dir) is not None:
        return resume(run.run_dir, ranks=ranks)
    return _start(run, ranks, ["train", str(config), *overrides], resume_step=None, is_resume=False)


def resume(run: Path, *, step: int | None = None, ranks: int | None = None) -> ExitCode:
    """Continue a run from its newest whole checkpoint, with the configuration it was started with.

    Args:
        run: Folder of the run.
        step: Step of the checkpoint to go on from; the newest by default.
        ranks: Ranks to start on this machine; by default as many as saved the checkpoint.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{run} is not the folder of a run: it has no {CONFIG_FILE}.",
            remedy="Give the folder that `jepa train` named, such as runs/NAME.",
        )
    config = load_config(path, RunConfig, [f"name={run.name}", f"runs_folder={run.parent}"]).config
    if step is None and _newest_step(run) == config.num_steps:
        Console().print(
            f"{run} is finished: all {config.num_steps} steps are done. `jepa report {run}` shows "
            "it; `--step N` goes on from an older checkpoint.",
            markup=False,
        )
        return ExitCode.DONE
    if ranks is None:
        ranks = _saved_ranks(run, step)
    words = ["resume", str(run), *([] if step is None else ["--step", str(step)])]
    return _start(config, ranks, words, resume_step=step, is_resume=True)


def _start(
    config: RunConfig,
    ranks: int | None,
    words: list[str],
    *,
    resume_step: int | None,
    is_resume: bool,
) -> ExitCode:
    launch = read_launch()
    if launch.launcher == "alone" and ranks is not None and ranks > 1:
        _become_launcher(ranks, words)
    if launch.launcher != "alone" and ranks is not None and ranks != launch.world_size:
        raise UsageError(
            f"--ranks {ranks} contradicts {launch.launcher}, which started {launch.world_size}."
        )
    return _run(config, launch, resume_step=resume_step, is_resume=is_resume)


def _run(
    config: RunConfig, launch: Launch, *, resume_step: int | None, is_resume: bool
) -> ExitCode:
    prepare_libraries(Path.home() / ".cache" / "jepa" / "torch_extensions")
    # Importing DeepSpeed takes seconds; mistakes in the configuration should not wait for it.
    from pipeline.engine.loop import train as run_loop  # noqa: PLC0415

    try:
        return run_loop(config, launch, resume=is_resume, step=resume_step)
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _PEER_WORDS):
            raise
        raise PeerLostError(
            f"Rank {launch.rank} of {launch.world_size} lost its peers: {error}"
        ) from error


def _become_launcher(ranks: int, words: list[str]) -> None:
    """Replaces this process by the launcher of the ranks, which keeps its process id."""
    sys.stdout.flush()
    arguments = ["-m", "launch.local", str(ranks), str(free_port()), "-m", "pipeline.cli", *words]
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - our own module


def _check(config: RunConfig, world_size: int) -> ExitCode:
    from pipeline.engine.check import check_run  # noqa: PLC0415

    identity = check_run(config, world_size)
    samples = ", ".join(f"{source.path} {source.num_samples}" for source in identity.sources)
    Console().print(
        f"{config.name}: {config.num_steps} steps in {len(config.stages)} stages on {world_size} "
        f"rank(s); samples: {samples}. Nothing is wrong with it; `jepa plan` says what it costs.",
        markup=False,
    )
    return ExitCode.DONE


def _newest_step(run_dir: Path) -> int | None:
    commits = layout.list_commits(run_dir)
    return commits[-1].step if commits else None


def _saved_ranks(run_dir: Path, step: int | None) -> int | None:
    commits = layout.list_commits(run_dir) if step is None else [commit_of_step(run_dir, step)]
    return layout.read_manifest(commits[-1].path).world_size if commits else None
