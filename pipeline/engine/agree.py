"""What all ranks know together before the optimiser's step: one small collective for everything."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.engine.stop import StopReason


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
    stop: StopReason


def agree(word: RankWord) -> Agreement:
    """Puts the ranks' words together; every rank must call it once per step, with equal terms."""
    names = sorted(word.terms)
    # Float64 on CPUs: counts and FLOPs must come out whole. One stop reason a slot: the sum is
    # positive where any rank has been asked for that reason.
    reasons = [1.0 if word.stop is reason else 0.0 for reason in StopReason]
    numbers = [word.data_wait_seconds, float(word.num_faults), word.flops, *reasons]
    device = word.loss.device
    measured = torch.stack([word.loss, *(word.terms[name] for name in names)]).detach()
    vector = torch.cat([measured.double(), torch.tensor(numbers, dtype=torch.float64).to(device)])
    dist.all_reduce(vector)
    total = vector.tolist()
    world_size = dist.get_world_size()
    loss, *rest = total
    terms, rest = rest[: len(names)], rest[len(names) :]
    wait, faults, flops, *asked = rest
    return Agreement(
        loss=loss / world_size,
        terms={name: value / world_size for name, value in zip(names, terms, strict=True)},
        data_wait_seconds=wait / world_size,
        num_faults=round(faults),
        flops=flops,
        stop=max(reason for reason, count in zip(StopReason, asked, strict=True) if count > 0),
    )
