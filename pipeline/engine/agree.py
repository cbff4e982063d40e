"""What all ranks know together before the optimiser's step: one small collective for everything.

Every rank gets every rank's word, not a sum of them: so each can say which rank's loss is not
finite and who is slow, and all come to the same decision without asking again.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.interval import SaveOutcome, SaveWord
from pipeline.engine.stop import StopReason

_NUM_NUMBERS = 11


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPace:
    """What a rank needed for its own work, in seconds; waiting for other ranks is not in it."""

    data: float = 0.0
    """Waiting for its loader."""
    compute: float = 0.0
    """A fixed piece of arithmetic on its device."""
    host: float = 0.0
    """Between the former step's end and this one's begin, saves apart: logging, the system."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankWord:
    """What one rank has to say about a step."""

    loss: Tensor
    """Mean over this rank's micro-batches, a scalar on the device."""
    terms: dict[str, Tensor]
    data_wait_seconds: float
    num_faults: int
    flops: float
    stop: StopReason
    gradient_square: Tensor | None = None
    """This rank's part of the squared norm of the whole gradient, a scalar on the device."""
    recomputed_flops: float = 0.0
    """Spent on computing activations again."""
    seconds_left: float = math.inf
    """Until this process is killed, as far as it knows."""
    save_seconds: float = 0.0
    """What a save takes, as far as it knows."""
    compute_seconds: float = 0.0
    """See `RankPace.compute`."""
    host_seconds: float = 0.0
    """See `RankPace.host`."""
    save: SaveWord = field(default_factory=SaveWord)
    """About checkpoints; only that of rank 0 counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """The same on every rank."""

    loss: float
    """Mean over ranks; not finite if any rank's is."""
    terms: dict[str, float]
    data_wait_seconds: float
    """Mean over ranks."""
    num_faults: int
    flops: float
    recomputed_flops: float
    gradient_norm: float
    """Of the whole gradient; not finite if any of it is."""
    stop: StopReason
    seconds_left: float
    """Of the rank that is killed first."""
    save_seconds: float
    """Of the slowest rank."""
    not_finite: tuple[str, ...]
    """Which rank's loss is not finite and in which term, such as `rank 1, loss_mask_0 is nan`."""
    paces: tuple[RankPace, ...]
    """One per rank."""
    save: SaveWord
    """That of rank 0."""


def agree(word: RankWord) -> Agreement:
    """Puts the ranks' words together; every rank must call it once per step, with equal terms.

    On a GPU this is where a step waits for its device, and the only place: what comes before has
    been queued without a look at any result, and what the report says of a step is read here.
    """
    names = sorted(word.terms)
    words = [_split(row, names) for row in _gather(_own_row(word, names)).tolist()]
    loss = _mean(one.measured["loss"] for one in words)
    return Agreement(
        loss=loss,
        terms={name: _mean(one.measured[name] for one in words) for name in names},
        data_wait_seconds=_mean(one.pace.data for one in words),
        num_faults=round(sum(one.num_faults for one in words)),
        flops=sum(one.flops for one in words),
        recomputed_flops=sum(one.recomputed_flops for one in words),
        gradient_norm=_root(sum(one.gradient_square for one in words)),
        stop=max(one.stop for one in words),
        seconds_left=min(one.seconds_left for one in words),
        save_seconds=max(one.save_seconds for one in words),
        not_finite=tuple(
            f"rank {rank}, {name} is {value}"
            for rank, one in enumerate(words)
            for name, value in _culprits(one.measured)
        ),
        paces=tuple(one.pace for one in words),
        save=words[0].save,
    )


def agree_on_stop(own: StopReason, device: torch.device) -> StopReason:
    """The highest reason that any rank knows of; every rank must call it at the same place."""
    reason = torch.tensor(int(own), device=device)
    dist.all_reduce(reason, op=dist.ReduceOp.MAX)
    return StopReason(int(reason.item()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Word:
    """A rank's word as the others read it."""

    measured: dict[str, float]
    pace: RankPace
    gradient_square: float
    num_faults: float
    flops: float
    recomputed_flops: float
    stop: StopReason
    seconds_left: float
    save_seconds: float
    save: SaveWord


def _own_row(word: RankWord, names: list[str]) -> Tensor:
    # Float64: counts and FLOPs must come out whole.
    numbers = [
        word.data_wait_seconds,
        word.compute_seconds,
        word.host_seconds,
        float(word.num_faults),
        word.flops,
        word.recomputed_flops,
        float(word.stop),
        word.seconds_left,
        word.save_seconds,
        float(word.save.is_due),
        float(word.save.outcome),
    ]
    square = torch.zeros_like(word.loss) if word.gradient_square is None else word.gradient_square
    values = [square, word.loss, *(word.terms[name] for name in names)]
    measured = torch.stack([value.detach().double() for value in values])
    # From page-locked memory: otherwise this copy would wait for the device on its own.
    known = torch.tensor(numbers, dtype=torch.float64, pin_memory=measured.is_cuda)
    return torch.cat([known.to(measured.device, non_blocking=True), measured])


def _gather(row: Tensor) -> Tensor:
    rows = row.new_empty(dist.get_world_size() * len(row))
    dist.all_gather_into_tensor(rows, row)
    return rows.view(-1, len(row))


def _split(row: list[float], names: list[str]) -> _Word:
    numbers, square, measured = row[:_NUM_NUMBERS], row[_NUM_NUMBERS], row[_NUM_NUMBERS + 1 :]
    data, compute, host, faults, flops, recomputed, *others = numbers
    stop, seconds_left, save_seconds, is_due, outcome = others
    return _Word(
        measured=dict(zip(["loss", *names], measured, strict=True)),
        pace=RankPace(data=data, compute=compute, host=host),
        gradient_square=square,
        num_faults=faults,
        flops=flops,
        recomputed_flops=recomputed,
        stop=StopReason(int(stop)),
        seconds_left=seconds_left,
        save_seconds=save_seconds,
        save=SaveWord(is_due=bool(is_due), outcome=SaveOutcome(int(outcome))),
    )


def _mean(values: Iterable[float]) -> float:
    # Not statistics.fmean, which refuses to add infinities of both signs.
    values = tuple(values)
    return sum(values) / len(values)


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0.0 else math.nan


def _culprits(measured: dict[str, float]) -> list[tuple[str, float]]:
    """The terms that are not finite; the loss itself only if all of its terms are."""
    bad = [(name, value) for name, value in measured.items() if not math.isfinite(value)]
    terms = [pair for pair in bad if pair[0] != "loss"]
    return terms or bad
