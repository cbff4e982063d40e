"""The loop: every effect of a step, in order, on one screen."""

from dataclasses import replace

from pipeline.engine.build import Parts, build
from pipeline.engine.commit import Saver
from pipeline.engine.guards import Guards
from pipeline.engine.rundir import begin_again, begin_fresh, clear_the_way
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
from pipeline.errors import ExitCode
from pipeline.run import RunConfig
from pipeline.stages import place_of_step


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
        # Still listening: a second signal must not end a run that has saved with another code.
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
    if launch.rank == 0 and resume:
        # Not before everything else has been found right: a refused resume changes nothing.
        start = replace(start, ignored=tuple(clear_the_way(config.run_dir, parts.first_step - 1)))
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
    config, saver, guards = parts.config, Saver(parts), Guards(parts)
    if parts.is_fresh:
        # The untrained weights: what a probe compares with, and the proof that saving works.
        saver.commit(0, guards.num_faults, last=True)
    for step in range(parts.first_step, config.num_steps + 1):
        place = place_of_step(config.stages, step)
        if place.step_in_stage == 1:
            parts.tracker.event("stage", step=step, stage=place.stage.name)
        result = take_step(parts, step)
        parts.tracker.log(result.report)
        guards.watch(result)
        stopping = result.stop is not StopReason.NONE
        stage_ends = place.step_in_stage == place.stage.steps
        if stopping or stage_ends or step % config.checkpoint.every_steps == 0:
            last = stopping or step == config.num_steps
            saver.commit(step, guards.num_faults, last=last)
        if stopping and step < config.num_steps:
            return result.stop
    return StopReason.NONE


def _end(parts: Parts, reason: StopReason) -> None:
    if reason is StopReason.NONE:
        parts.tracker.event("end", step=parts.config.num_steps, reason="all stages are done")
        parts.tracker.close("finished")
    else:
        parts.tracker.event("stop", reason=reason.words)
        parts.tracker.close("stopped")
    parts.loader.close()
    leave_process_group()
