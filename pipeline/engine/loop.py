"""The loop: every effect of a step, in order, on one screen."""

from dataclasses import dataclass, replace

from pipeline.checkpoint.layout import list_commits
from pipeline.engine.agree import agree_on_stop
from pipeline.engine.build import Parts, build
from pipeline.engine.collectives import COLLECTIVES
from pipeline.engine.commit import Saver
from pipeline.engine.deepspeed_import import leave_groups
from pipeline.engine.guards import Guards
from pipeline.engine.last_words import as_memory_full, as_peer_loss
from pipeline.engine.rundir import Wish, begin, clear_the_way, note_end
from pipeline.engine.spikes import Spike, plan_rewind
from pipeline.engine.step import StepResult, take_step
from pipeline.engine.stop import StopReason
from pipeline.engine.supervision import Supervision, supervised
from pipeline.environment import (
    Launch,
    choose_device,
    join_process_group,
    record_collectives,
    set_cpu_threads,
)
from pipeline.errors import ExitCode, JepaError, NumericsError
from pipeline.machine import process_age_seconds
from pipeline.run import RunConfig
from pipeline.stages import place_of_step
from pipeline.track.faults import FAULTS_FOLDER, fault_fields
from pipeline.track.rewinds import steps_to_take, write_rewinds


def train(config: RunConfig, launch: Launch, wish: Wish) -> ExitCode:
    """Trains a run to its end, or until it is asked to stop.

    Args:
        config: The run.
        launch: This process's place among the ranks.
        wish: What this start was asked for.

    Returns:
        DONE, or SAVED_RUN_AGAIN after a stop in good order.

    Raises:
        JepaError: Whatever ended the run; its exit code says of what kind it is.
    """
    with supervised(config, launch) as care:
        try:
            parts = _start_up(config, launch, wish, care)
            ending = _guarded_loop(parts, care)
        except BaseException as error:
            told = as_peer_loss(error, launch)
            care.last_words.leave(told or error)
            if told is not None:
                raise told from error
            raise
        # Still listening: a second signal must not end a run that has saved with another code.
        _end(parts, ending)
    return ExitCode.DONE if ending is None else ExitCode.SAVED_RUN_AGAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ending:
    """Why a run stops before its last step."""

    words: str
    is_in_order: bool = True
    """False if it was stopped without a save: three of those in a row are no progress."""


def _start_up(config: RunConfig, launch: Launch, wish: Wish, care: Supervision) -> Parts:
    ages = [process_age_seconds()]
    set_cpu_threads(launch)
    device = choose_device(launch)
    if device.type == "cuda":
        record_collectives(config.run_dir / FAULTS_FOLDER / COLLECTIVES)
    join_process_group(launch, device, timeout_seconds=config.peer_timeout_seconds)
    ages.append(process_age_seconds())
    start = begin(config, launch, wish, care.ownership)
    if device.type == "cuda":
        # NCCL's own watchdog writes there, and makes no folder.
        (config.run_dir / FAULTS_FOLDER).mkdir(exist_ok=True)
    care.attach(config, start)
    care.stop.clear()
    parts = build(config, launch, device, start, wish, care)
    if launch.rank == 0 and wish.resume:
        # Not before everything else has been found right: a refused resume changes nothing.
        start = replace(start, ignored=tuple(clear_the_way(config.run_dir, parts.first_step - 1)))
    ages.append(process_age_seconds())
    parts.tracker.event(
        "resume" if wish.resume else "start",
        step=parts.first_step - 1,
        world_size=launch.world_size,
        start_up_seconds=_phases(ages),
        ignored_saves=list(start.ignored),
        rejected=[str(bad) for bad in start.found.rejected] if start.found else [],
        **(parts.taken_up.to_dict() if parts.taken_up else {}),
    )
    for change in parts.data_changes:
        parts.tracker.event("dataset_changed", step=parts.first_step - 1, reason=change)
    if parts.origin is not None:
        parts.tracker.event("init_from", step=0, **parts.origin.to_dict())
    return parts


def _phases(ages: list[float]) -> dict[str, float]:
    imported, met, built = ages
    seconds = {"imports": imported, "meeting": met - imported, "building": built - met}
    return {phase: round(value, 2) for phase, value in seconds.items()}


def _guarded_loop(parts: Parts, care: Supervision) -> _Ending | None:
    saver = Saver(parts)
    try:
        return _loop(parts, saver)
    except BaseException as error:
        # No collectives from here on: a peer may be gone.
        told = as_peer_loss(error, parts.launch) or _memory_full(error, parts) or error
        care.last_words.leave(told)
        saver.settle()
        if parts.launch.rank == 0:
            for fault in care.last_words.collect(told):
                parts.tracker.event("fault", **fault_fields(fault))
        parts.tracker.close("failed")
        if told is not error:
            raise told from error
        raise


def _memory_full(error: BaseException, parts: Parts) -> JepaError | None:
    step, first = parts.care.watchdog.place[1], parts.first_step
    place = place_of_step(parts.config.stages, max(step, 1))
    is_first = step <= first or place.step_in_stage == 1
    return as_memory_full(error, parts.config, step, is_first=is_first)


def _loop(parts: Parts, saver: Saver) -> _Ending | None:
    config, care = parts.config, parts.care
    guards = Guards(parts)
    asked = agree_on_stop(care.stop.noted, parts.device)
    if asked is not StopReason.NONE:
        return _Ending(words=f"{asked.words} before the first step; nothing to save")
    if parts.is_fresh:
        # The untrained weights: what a probe compares with, and the proof that saving works.
        _save(parts, saver, guards, 0, last=True)
    stage = -1
    for step in steps_to_take(parts.first_step, config.num_steps, parts.rewinds):
        place = place_of_step(config.stages, step)
        care.watchdog.begin("step", step, has_precedent=place.index == stage)
        if place.index != stage and place.step_in_stage == 1:
            parts.tracker.event("stage", step=step, stage=place.stage.name)
        stage = place.index
        result = take_step(parts, step, guards)
        guards.rest()
        care.watchdog.enter("log")
        care.ownership.check()
        parts.tracker.log(result.report)
        guards.watch(result.report, result.agreed, result.faults, result.verdict.skip_reason)
        saver.look(result.agreed.save)
        if result.verdict.rewind is not None:
            return _rewind(parts, saver, result.verdict.rewind)
        ending = _save_if_due(parts, saver, guards, result)
        if ending is not None:
            return ending
    _begin_save(parts, config.num_steps, 0.0)
    saver.finish(last=True)  # in flight if the steps after it are left out
    return None


def _save_if_due(parts: Parts, saver: Saver, guards: Guards, result: StepResult) -> _Ending | None:
    """Saves what is to be saved after a step, and says whether the run stops here."""
    config, agreed, step = parts.config, result.agreed, result.report.step
    place = place_of_step(config.stages, step)
    is_last = step == config.num_steps
    stop = StopReason.NONE if is_last else agreed.stop
    parts.care.stop.expect(
        step_seconds=parts.care.watchdog.recent("step"), save_seconds=agreed.save_seconds
    )
    if stop is not StopReason.NONE and agreed.save_seconds > agreed.seconds_left:
        saver.settle()
        newest = max((c.step for c in list_commits(parts.run_dir)), default=None)
        return _Ending(
            words=f"{stop.words}; not enough time to save (need {agreed.save_seconds:.0f} s, have "
            f"{max(0.0, agreed.seconds_left):.0f} s); the last checkpoint is step {newest}",
            is_in_order=False,
        )
    ends_stage = place.step_in_stage == place.stage.steps
    if not (stop or ends_stage or parts.saves.must_save(step, agreed.save)):
        return None
    _save(parts, saver, guards, step, last=is_last or stop is not StopReason.NONE)
    if stop is StopReason.NONE and not is_last:
        # Asked for during the save: the run need not take another step to save again.
        stop = agree_on_stop(parts.care.stop.noted, parts.device)
        if stop is not StopReason.NONE:
            saver.finish(last=True)
    return None if stop is StopReason.NONE else _Ending(words=stop.words)


def _begin_save(parts: Parts, step: int, save_seconds: float) -> None:
    """A save may wait for the one before it, and writing may take ten times what it took so far."""
    parts.care.watchdog.begin(
        "save", step, has_precedent=save_seconds > 0, allowance=10 * save_seconds
    )


def _save(parts: Parts, saver: Saver, guards: Guards, step: int, *, last: bool) -> None:
    _begin_save(parts, step, guards.save_seconds)
    parts.care.ownership.check()
    saver.commit(step, guards.counts(), last=last)


def _rewind(parts: Parts, saver: Saver, spike: Spike) -> _Ending:
    """Puts on record what is to be left out; the next start goes back and does so.

    Raises:
        NumericsError: The run has been rewound too often.
    """
    _begin_save(parts, spike.step, 0.0)
    saver.finish()
    config = parts.config.guards
    if len(parts.rewinds) >= config.max_rewinds:
        raise NumericsError(
            f"{spike.words}; the run has been rewound {len(parts.rewinds)} times, allowed are "
            f"{config.max_rewinds}."
        )
    stage = place_of_step(parts.config.stages, spike.step)
    first = spike.step - stage.step_in_stage + 1
    commits = [commit.step for commit in list_commits(parts.run_dir)]
    plan = plan_rewind(spike, commits, config, range(first, first + stage.stage.steps))
    words = (
        f"{spike.words}; going back to step {plan.to_step}, leaving out steps {plan.first_step} to "
        f"{plan.last_step}"
    )
    if parts.launch.rank == 0:
        write_rewinds(parts.run_dir, [*parts.rewinds, plan])
    parts.tracker.event("rewind", step=spike.step, reason=words)
    return _Ending(words=words)


def _end(parts: Parts, ending: _Ending | None) -> None:
    parts.care.watchdog.begin("end", parts.config.num_steps)
    if ending is None:
        parts.tracker.event("end", step=parts.config.num_steps, reason="all stages are done")
        parts.tracker.close("finished")
    else:
        parts.tracker.event("stop", reason=ending.words)
        parts.tracker.close("stopped")
    if parts.launch.rank == 0 and (ending is None or ending.is_in_order):
        note_end(parts.run_dir, "finished" if ending is None else "stopped")
    parts.loader.close()
    leave_groups()
