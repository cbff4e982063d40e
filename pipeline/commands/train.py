"""`jepa train` and `jepa resume`."""

import contextlib
import os
import sys
from pathlib import Path

from rich.console import Console

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import commit_of_step, verify
from pipeline.commands import ConfigPath, Overrides
from pipeline.config.load import load_config
from pipeline.config.report import changes
from pipeline.data.worker import start_server
from pipeline.engine.rundir import Wish
from pipeline.environment import Launch, end_rank, free_port, prepare_libraries, read_launch
from pipeline.errors import CheckpointError, ConfigError, ExitCode, UsageError
from pipeline.run import RunConfig
from pipeline.track.folder import CONFIG_FILE
from pipeline.track.rewinds import pending, read_rewinds


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
    if or_resume and (layout.list_commits(run.run_dir) or _bring_back(run.run_dir, run)):
        _must_be_same(run)
        return _resume(run.run_dir, ranks, Wish(resume=True, is_unattended=True))
    words = ["train", str(config), *overrides, *(["--or-resume"] if or_resume else [])]
    return _start(run, ranks, words, Wish(is_unattended=or_resume))


def resume(
    run: Path,
    *,
    step: int | None = None,
    ranks: int | None = None,
    allow_dataset_change: bool = False,
    retry: bool = False,
    store: str | None = None,
) -> ExitCode:
    """Continue a run from its newest whole checkpoint, with the configuration it was started with.

    Args:
        run: Folder of the run.
        step: Step of the checkpoint to go on from; the newest by default.
        ranks: Ranks to start on this machine; by default as many as saved the checkpoint.
        allow_dataset_change: Go on although the datasets are not those that the checkpoint was
            trained on; steps from here on show other clips than an uninterrupted run's.
        retry: Go on although the last starts ended before another checkpoint.
        store: URL below which the run's checkpoints were published (its `checkpoint.store`), if
            its folder is lost: the newest whole one is brought back first.
    """
    if store is not None:
        _fetch(run.resolve(), store, step)
    wish = Wish(resume=True, step=step, allow_dataset_change=allow_dataset_change, retry=retry)
    return _resume(run, ranks, wish)


def _resume(run: Path, ranks: int | None, wish: Wish) -> ExitCode:
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UsageError(
            f"{run} is not the folder of a run: it has no {CONFIG_FILE}.",
            remedy="Give the folder that `jepa train` named, such as runs/NAME.",
        )
    run = run.resolve()  # `.` has a name too
    # The folder may have been moved or renamed since it was made.
    moved = {"name": run.name, "runs_folder": run.parent}
    config = load_config(path, RunConfig).config.model_copy(update=moved)
    if not layout.list_commits(run):
        _bring_back(run, config, wish.step)
    if wish.step is None and _is_finished(run, config):
        Console().print(
            f"{run} is finished: all {config.num_steps} steps are done. `jepa report {run}` shows "
            "it; `--step N` goes on from an older checkpoint.",
            markup=False,
        )
        return ExitCode.DONE
    _must_have_saved(run, config, wish.step)
    if ranks is None and read_launch().launcher == "alone":
        ranks = _saved_ranks(run, wish.step)
    _must_fit(config, ranks or read_launch().world_size)
    return _start(config, ranks, ["resume", str(run), *_flags(wish)], wish)


def _bring_back(run: Path, config: RunConfig, step: int | None = None) -> bool:
    """Brings a lost run's checkpoint back if the run has a store and something is there."""
    from pipeline.checkpoint.store import CommitStore  # noqa: PLC0415 - few runs need it

    url = config.checkpoint.store
    if url is None or not CommitStore(url, run.name).steps():
        return False
    _fetch(run, url, step)
    return True


def _fetch(run: Path, url: str, step: int | None) -> None:
    from pipeline.checkpoint.mirror import restore  # noqa: PLC0415
    from pipeline.checkpoint.store import CommitStore  # noqa: PLC0415

    store = CommitStore(url, run.name)
    restored = restore(store, run, step)
    if restored is not None:
        console = Console()
        for bad in restored.rejected:
            reasons = "; ".join(bad.reasons)
            console.print(f"step {bad.commit.step} rejected: {reasons}", markup=False)
        console.print(f"step {restored.step} brought back from {store.url}", markup=False)


def _flags(wish: Wish) -> list[str]:
    return [
        *(["--step", str(wish.step)] if wish.step is not None else []),
        *(["--allow-dataset-change"] if wish.allow_dataset_change else []),
        *(["--retry"] if wish.retry else []),
    ]


def _start(config: RunConfig, ranks: int | None, words: list[str], wish: Wish) -> ExitCode:
    launch = read_launch()
    if ranks is not None and ranks < 1:
        raise UsageError(f"expected --ranks of at least 1, got {ranks}")
    if launch.launcher == "alone" and ranks is not None and ranks > 1:
        _become_launcher(config, ranks, words)
    if launch.launcher != "alone" and ranks is not None and ranks != launch.world_size:
        raise UsageError(
            f"--ranks {ranks} contradicts {launch.launcher}, which started {launch.world_size}."
        )
    code = _run(config, launch, wish)
    if launch.launcher == "alone" and pending(read_rewinds(config.run_dir)) is not None:
        # Nobody else starts a run of one rank again; the number of rewinds is limited.
        _replace_process(["-m", "pipeline.cli", "resume", str(config.run_dir)])
    return code


def _run(config: RunConfig, launch: Launch, wish: Wish) -> ExitCode:
    prepare_libraries(Path.home() / ".cache" / "jepa" / "torch_extensions")
    if config.data.workers:
        # Loader workers import on another core what this process needs seconds for as well.
        start_server()
    # Importing DeepSpeed takes seconds; mistakes in the configuration should not wait for it.
    from pipeline.engine.loop import train as run_loop  # noqa: PLC0415

    code = run_loop(config, launch, wish)
    if launch.launcher != "alone":
        end_rank(code)
    return code


def _become_launcher(config: RunConfig, ranks: int, words: list[str]) -> None:
    """Replaces this process by the launcher of the ranks, which keeps its process id."""
    run_dir, port = str(config.run_dir), str(free_port())
    command = ["-m", "launch.local", str(ranks), port, run_dir, "-m", "pipeline.cli", *words]
    _replace_process(command)


def _replace_process(arguments: list[str]) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - our own module


def _check(config: RunConfig, world_size: int) -> ExitCode:
    from pipeline.engine.check import check_run  # noqa: PLC0415
    from pipeline.engine.init import check_weights  # noqa: PLC0415

    identity = check_run(config, world_size)
    check_weights(config)
    samples = ", ".join(f"{source.path} {source.num_samples}" for source in identity.sources)
    Console().print(
        f"{config.name}: {config.num_steps} steps in {len(config.stages)} stages on {world_size} "
        f"rank(s); samples: {samples}. Nothing is wrong with it; `jepa plan` says what it costs.",
        markup=False,
    )
    return ExitCode.DONE


def _must_be_same(config: RunConfig) -> None:
    """`--or-resume` goes on with the stored configuration: another one must not be ignored."""
    path = config.run_dir / CONFIG_FILE
    stored = load_config(path, RunConfig).config
    found = changes(stored, config)
    if found:
        keys = ", ".join(change.key for change in found[:10])
        raise ConfigError(
            f"{config.run_dir} was started with other values of: {keys}.",
            remedy=f"Put them back, give the new run another name=…, or edit {path} on purpose.",
        )


def _is_finished(run_dir: Path, config: RunConfig) -> bool:
    commits = layout.list_commits(run_dir)
    return bool(commits) and commits[-1].step == config.num_steps and not verify(commits[-1].path)


def _must_have_saved(run_dir: Path, config: RunConfig, step: int | None) -> None:
    """Asks before anything is started; whether the bytes are right is seen when they are read."""
    if config.checkpoint.store is not None:
        return  # what is not here may be there
    if step is not None:
        commit_of_step(run_dir, step)
    elif not layout.list_commits(run_dir) and not layout.list_headless(run_dir):
        raise CheckpointError(
            f"{run_dir} has no checkpoint to go on from.",
            remedy="If it never saved any, start it with `jepa train CONFIG`.",
        )


def _must_fit(config: RunConfig, ranks: int) -> None:
    """A run goes on at any number of ranks that shares its global batch in whole micro-batches."""
    batch, sizes = config.global_batch, {stage.micro_batch for stage in config.stages}
    fitting = [n for n in range(1, batch + 1) if all(batch % (size * n) == 0 for size in sizes)]
    if ranks not in fitting:
        raise ConfigError(
            f"{ranks} ranks cannot share the run's global batch of {batch} clips in whole "
            f"micro-batches of {', '.join(map(str, sorted(sizes)))}.",
            remedy="These numbers of ranks can, with the same clips and masks at every step: "
            f"{', '.join(map(str, fitting))}.",
        )


def _saved_ranks(run_dir: Path, step: int | None) -> int | None:
    commits = layout.list_commits(run_dir) if step is None else [commit_of_step(run_dir, step)]
    for commit in reversed(commits):
        # A damaged one is named when the checkpoint is looked for; an older one knows as well.
        with contextlib.suppress(CheckpointError):
            return layout.read_manifest(commit.path).world_size
    return None
