"""The loop: every effect of a step, in order, on one screen."""

from importlib.metadata import version
from time import monotonic

from pipeline.checkpoint import layout
from pipeline.checkpoint.save import SaveRequest, prune, save
from pipeline.engine.build import Parts, build, run_state
from pipeline.engine.rundir import begin_again, begin_fresh, record_faults
from pipeline.engine.save import write_rank_files
from pipeline.engine.step import take_step
from pipeline.engine.stop import StopReason, StopWatch
from pipeline.environment import (
    Launch,
    choose_device,
    join_process_group,
    leave_process_group,
    process_age_seconds,
    set_cpu_threads,
)
from pipeline.errors import ExitCode, StorageError
from pipeline.run import RunConfig
from pipeline.stages import place_of_step

# A full disk may be emptied by others; a folder that refuses three saves in a row will not heal.
_MAX_FAILED_SAVES = 3


def train(
    config: RunConfig, launch: Launch, *, resume: bool = False, step: int | None = None
) -> ExitCode:
    """Trains a run to its end, or until it is asked to stop.

    Args:
        config: The run.
        launch: This process's place among the ranks.
        resume: Go on from a commit; a fresh run otherwise.
        step: The commit to go on from; the newest that is whole by default.

    Returns:
        DONE, or SAVED_RUN_AGAIN after a stop whose commit is whole.

    Raises:
        JepaError: Whatever ended the run; its exit code says of what kind it is.
    """
    stop = StopWatch(config.run_dir, is_main=launch.rank == 0)
    # From the first moment: a signal during start-up is obeyed after the first step.
    with stop.listening():
        parts = _start_up(config, launch, stop, resume=resume, step=step)
        try:
            reason = _loop(parts)
        except BaseException as error:
            # No collectives from here on: a peer may be gone.
            parts.tracker.event("fault", reason=f"{type(error).__name__}: {error}")
            parts.tracker.close("failed")
            raise
    _end(parts, reason)
    return ExitCode.DONE if reason is StopReason.NONE else ExitCode.SAVED_RUN_AGAIN


def _start_up(
    config: RunConfig, launch: Launch, stop: StopWatch, *, resume: bool, step: int | None
) -> Parts:
    ages = [process_age_seconds()]
    set_cpu_threads(launch)
    device = choose_device(launch)
    join_process_group(launch, device, timeout_seconds=config.peer_timeout_seconds)
    ages.append(process_age_seconds())
    start = begin_again(config, launch, step) if resume else begin_fresh(config, launch)
    stop.clear()
    parts = build(config, launch, device, start, stop)
    ages.append(process_age_seconds())
    parts.tracker.event(
        "resume" if resume else "start",
        step=parts.first_step - 1,
        world_size=launch.world_size,
        start_up_seconds=_phases(ages),
        ignored_saves=list(start.ignored),
        rejected=[str(bad) for bad in start.found.rejected] if start.found else [],
    )
    return parts


def _phases(ages: list[float]) -> dict[str, float]:
    imported, met, built = ages
    seconds = {"imports": imported, "meeting": met - imported, "building": built - met}
    return {phase: round(value, 2) for phase, value in seconds.items()}


def _loop(parts: Parts) -> StopReason:
    config, num_faults, failed_saves = parts.config, parts.faults_before, 0
    if parts.first_step == 1:
        # The untrained weights: what a probe compares with, and the proof that saving works.
        failed_saves = _commit(parts, 0, num_faults, failed_saves)
    for step in range(parts.first_step, config.num_steps + 1):
        place = place_of_step(config.stages, step)
        if place.step_in_stage == 1:
            parts.tracker.event("stage", step=step, stage=place.stage.name)
        result = take_step(parts, step)
        parts.tracker.log(result.report)
        if result.report.num_faults:
            num_faults += result.report.num_faults
            record_faults(parts.run_dir, result.faults)
        if result.report.skipped:
            parts.tracker.event("skip", step=step, reason="the gradient was not finite")
        stopping = result.stop is not StopReason.NONE
        stage_ends = place.step_in_stage == place.stage.steps
        if stopping or stage_ends or step % config.checkpoint.every_steps == 0:
            failed_saves = _commit(parts, step, num_faults, failed_saves)
            _refuse_to_lose_work(failed_saves, last=stopping or step == config.num_steps)
        if stopping and step < config.num_steps:
            return result.stop
    return StopReason.NONE


def _commit(parts: Parts, step: int, num_faults: int, failed_saves: int) -> int:
    """Saves; returns how many saves in a row have failed."""
    begin = monotonic()
    commits = layout.list_commits(parts.run_dir)
    result = save(
        SaveRequest(
            run_dir=parts.run_dir,
            run_id=parts.run_id,
            step=step,
            parent_step=max((c.step for c in commits if c.step < step), default=None),
            versions={name: version(name) for name in ("jepa-pipeline", "torch", "deepspeed")},
            write=lambda folder: write_rank_files(
                parts.engine, folder, run_state(parts, step, num_faults)
            ),
        )
    )
    seconds = monotonic() - begin
    if result.failure is not None:
        parts.tracker.event("save_failed", step=step, reason=result.failure, seconds=seconds)
        return failed_saves + 1
    if parts.launch.rank == 0:
        prune(parts.run_dir, parts.config.checkpoint)
    mib = result.num_bytes / 2**20
    parts.tracker.event("save", step=step, seconds=round(seconds, 3), mib=round(mib, 1))
    return 0


def _refuse_to_lose_work(failed_saves: int, *, last: bool) -> None:
    if failed_saves >= _MAX_FAILED_SAVES or (last and failed_saves):
        raise StorageError(
            f"{failed_saves} saves in a row failed; `jepa status` shows why. The last whole "
            "checkpoint stands."
        )


def _end(parts: Parts, reason: StopReason) -> None:
    if reason is StopReason.NONE:
        parts.tracker.event("end", step=parts.config.num_steps, reason="all stages are done")
        parts.tracker.close("finished")
    else:
        parts.tracker.event("stop", reason=reason.words)
        parts.tracker.close("stopped")
    parts.loader.close()
    leave_process_group()
