"""One optimiser step, from micro-batches to the teacher's move, and its report."""

import resource
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.clip import ClipBatch, Losses, Progress, SampleFault, StepReport
from pipeline.engine.agree import Agreement, RankWord, agree
from pipeline.engine.build import Parts
from pipeline.engine.guards import Guards, Verdict
from pipeline.engine.rundir import append_faults
from pipeline.engine.zero import Update
from pipeline.errors import DataError
from pipeline.plan.account import batch_flops, batch_recomputed_flops
from pipeline.stages import StagePlace, accumulation, place_of_step
from pipeline.track.folder import read_run_info, update_run_info
from pipeline.track.peaks import utilisation
from pipeline.track.signals import collapse_signals

# Enough clips for a rank, few enough that measuring it costs milliseconds.
_HEALTH_CLIPS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What the loop learns of a step besides its report."""

    report: StepReport
    agreed: Agreement
    verdict: Verdict
    faults: tuple[SampleFault, ...]
    """This rank's."""


def take_step(parts: Parts, step: int, guards: Guards) -> StepResult:
    """Trains on one global batch, unless all ranks agree to leave its update out.

    Raises:
        DataError: The loader gave up.
    """
    begin = time.monotonic()
    config = parts.config
    place = place_of_step(config.stages, step)
    if parts.tuner.begin(place, step) and parts.launch.rank == 0:
        _record_tuning(parts, place)
    progress = Progress(step=step, total_steps=config.num_steps, stage=place.index)
    gradient = _gradient(parts, place, progress, guards.own_pace(step))
    parts.care.watchdog.enter("agree")
    agreed = agree(gradient.word)
    parts.care.watchdog.enter("update")
    verdict = guards.judge(place, step, agreed)
    learning_rate, weight_decay = config.learning_rate(step), config.weight_decay(step)
    update = _update(parts, verdict, agreed, (learning_rate, weight_decay))
    # A step that was left out must not move the teacher either.
    logged = {} if update.skipped else parts.engine.objective.after_step(progress)
    health = _health(parts, gradient.features, step)
    tokens = config.grid(place.stage.frames, place.stage.resolution).num_tokens
    report = StepReport(
        step=step,
        stage=place.index,
        stage_name=place.stage.name,
        loss=agreed.loss,
        terms=agreed.terms,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        momentum=logged.get("momentum", 0.0),
        clips=config.global_batch,
        tokens=config.global_batch * tokens,
        health=health,
        **_measured(parts, agreed, update, begin),
    )
    return StepResult(report=report, agreed=agreed, verdict=verdict, faults=gradient.faults)


def _record_tuning(parts: Parts, place: StagePlace) -> None:
    tuning = read_run_info(parts.run_dir).get("tuning", {})
    changed = {**tuning, place.stage.name: parts.tuner.chosen}
    update_run_info(parts.run_dir, {"tuning": changed})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gradient:
    word: RankWord
    faults: tuple[SampleFault, ...]
    features: tuple[Tensor, ...]
    """Features [b, n, D] of each micro-batch's clips, if the objective gives any."""


def _update(
    parts: Parts, verdict: Verdict, agreed: Agreement, rates: tuple[float, float]
) -> Update:
    if verdict.skip_reason is None:
        parts.saves.wait_for_copy()  # of the checkpoint that was begun after the former step
        return parts.engine.update(*rates, gradient_norm=agreed.gradient_norm)
    parts.engine.drop()
    return Update(gradient_norm=agreed.gradient_norm, skipped=True)


def _gradient(
    parts: Parts, place: StagePlace, progress: Progress, pace: tuple[float, float]
) -> _Gradient:
    num = accumulation(place.stage, parts.config.global_batch, parts.launch.world_size)
    waited, flops, recomputed = 0.0, 0.0, 0.0
    faults: list[SampleFault] = []
    sums: dict[str, Tensor] = {}
    features: list[Tensor] = []
    watchdog = parts.care.watchdog
    for number in range(num):
        watchdog.enter("data")
        batch = _next_batch(parts, faults)
        waited += parts.feed.wait_seconds
        faults += batch.faults
        flops += batch_flops(parts.config.objective, batch)
        recomputed += batch_recomputed_flops(parts.config, batch, parts.tuner.recomputed)
        watchdog.enter("compute")
        losses = parts.engine.forward_backward(
            batch,
            progress,
            accumulation=num,
            last=number == num - 1,
            meanwhile=parts.feed.ahead,
        )
        _add(sums, losses, num)
        if losses.features_ND is not None:
            features.append(losses.features_ND.unflatten(0, (len(batch.keys), -1)))
    word = RankWord(
        loss=sums.pop("total"),
        terms=sums,
        data_wait_seconds=waited,
        num_faults=len(faults),
        flops=flops,
        recomputed_flops=recomputed,
        gradient_square=parts.engine.gradient_square(),
        stop=parts.care.stop.noted,
        seconds_left=parts.care.stop.seconds_left,
        save_seconds=max(watchdog.recent("save"), parts.saves.save_seconds),
        save=parts.saves.word(),
        compute_seconds=pace[0],
        host_seconds=pace[1],
    )
    return _Gradient(word=word, faults=tuple(faults), features=tuple(features))


def _next_batch(parts: Parts, faults: list[SampleFault]) -> ClipBatch:
    try:
        batch = parts.feed.take()
    except DataError as error:
        # The run ends here: what led to it must be in the quarantine file, without a collective.
        append_faults(parts.run_dir, (*faults, *error.faults))
        raise
    for notice in parts.loader.take_notices():
        parts.tracker.event("loader", notice=notice)
    return batch


def _add(sums: dict[str, Tensor], losses: Losses, num: int) -> None:
    for name, value in {"total": losses.total, **losses.terms}.items():
        share = value.detach().float() / num
        sums[name] = sums[name] + share if name in sums else share


def _health(parts: Parts, features: tuple[Tensor, ...], step: int) -> dict[str, float] | None:
    if not features or (step % parts.config.track.health_every_steps and step != 1):
        return None
    # The rank grows with the number of clips it is measured on: the same number in every stage,
    # whatever its micro-batch, keeps the curve in one piece.
    world_size = parts.launch.world_size
    num_clips = min(parts.config.global_batch, _HEALTH_CLIPS) // world_size or 1
    own = torch.cat(features)[:num_clips].contiguous()
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own)
    features_ND = torch.cat(gathered).flatten(0, 1)
    return collapse_signals(features_ND, num_clips=num_clips * world_size)


def _measured(parts: Parts, agreed: Agreement, update: Update, begin: float) -> dict:
    # Nobody waits for the device here: the agreement has, and it does so in every step, so what an
    # update still takes after this line is counted in the step that follows.
    seconds = time.monotonic() - begin
    if parts.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(parts.device) / 2**30
    else:
        # Linux gives the peak of the resident set in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "step_seconds": seconds,
        "data_wait_seconds": agreed.data_wait_seconds,
        "flops": agreed.flops,
        "hardware_flops": agreed.flops + agreed.recomputed_flops,
        "mfu": utilisation(agreed.flops, seconds, parts.tuner.peak, parts.launch.world_size),
        "num_faults": agreed.num_faults,
        "gradient_norm": update.gradient_norm,
        "skipped": update.skipped,
        "peak_memory_gib": peak,
    }
