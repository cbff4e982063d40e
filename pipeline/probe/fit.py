"""Fitting heads: all pairs of a sweep see the same clips in the same order, each its own AdamW."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.probe.outcome import Accuracy, Outcome, joined, of_scores
from pipeline.probe.tasks import SweepConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class InputBatch:
    """Clips for a head: inputs [B, V, …] with V views each, classes and places in the split [B].

    Inputs may be bf16, at half the memory; heads are given them as fp32.
    """

    inputs_BV: Tensor
    labels_B: Tensor
    index_B: Tensor


class Inputs(Protocol):
    """Where a head's inputs come from: the cache, or the encoder itself."""

    labels_N: Tensor

    def batches(self, order: Tensor, size: int, *, epoch: int | None) -> Iterator[InputBatch]:
        """Batches of `size` clips in `order`; `epoch` varies the clips, None never does."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """Clips that the heads of a sweep are judged on."""

    inputs: Inputs
    order: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochScore:
    """One head after one epoch: its mean training loss, and its accuracies."""

    epoch: int
    loss: float
    train_top1: float
    heldout: Accuracy | None
    """On the training clips that were held out, if any were."""
    validation: Accuracy


@dataclass(kw_only=True, slots=True)
class FittedHead:
    """One head of a sweep with its learning curve."""

    head: nn.Module
    learning_rate: float
    weight_decay: float
    curve: list[EpochScore] = field(default_factory=list)
    best: Outcome | None = None
    """On validation, after the first of the epochs with the highest accuracy there."""
    last: Outcome | None = None
    """On validation, after the last epoch."""

    @property
    def best_epoch(self) -> EpochScore:
        """The first of the epochs with the highest accuracy on validation."""
        return max(self.curve, key=lambda score: score.validation.top1)


@dataclass(kw_only=True, slots=True)
class BestWeights:
    """The weights of the best head and epoch on validation so far, on the CPU."""

    top1: float = -1.0
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitPlan:
    """What a sweep is fitted on and how."""

    train: Inputs
    order: Tensor
    """Training clips used for fitting."""
    heldout: Judge | None
    validation: Judge
    sweep: SweepConfig
    seed: int
    device: torch.device
    autocast: torch.dtype | None
    keep_best: BestWeights | None = None
    """Where the weights of the best epoch on validation go; nowhere if they are not wanted."""


def fit_sweep(
    build: Callable[[], nn.Module],
    plan: FitPlan,
    report: Callable[[int, int], None],
) -> list[FittedHead]:
    """Fit one head per pair of learning rate and weight decay.

    All heads start from the same weights, drawn with the plan's seed, so that within a sweep only
    the pair differs. The learning rate falls to zero along a cosine.

    Args:
        build: Makes a head; draws from torch's global generator.
        plan: The clips and the sweep.
        report: Told the number of epochs done, and their total.
    """
    sweep = plan.sweep
    fitted = [
        FittedHead(
            head=_seeded(build, plan.seed).to(plan.device),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        )
        for learning_rate in sweep.learning_rates
        for weight_decay in sweep.weight_decays
    ]
    optimisers = [
        torch.optim.AdamW(h.head.parameters(), lr=h.learning_rate, weight_decay=h.weight_decay)
        for h in fitted
    ]
    generator = torch.Generator().manual_seed(plan.seed)
    for epoch in range(sweep.epochs):
        order = plan.order[torch.randperm(len(plan.order), generator=generator)]
        sums = _train_epoch(fitted, optimisers, plan, order=order, epoch=epoch)
        _judge_epoch(fitted, plan, epoch=epoch, sums=sums)
        report(epoch + 1, sweep.epochs)
    return fitted


@torch.no_grad()
def outcomes(
    scorers: Sequence[Callable[[Tensor], Tensor]],
    judge: Judge,
    *,
    device: torch.device,
    batch: int = 64,
    at_once: int | None = None,
) -> list[Outcome]:
    """What each scorer says of the same clips; scores are averaged over a clip's views.

    No clip is left out: the last batch may be smaller.

    Args:
        scorers: From inputs [B · V, …] to class scores that may be averaged, [B · V, classes].
        judge: The clips.
        device: Where scorers compute.
        batch: Clips read at once.
        at_once: Views of clips that a scorer computes at once; all that were read by default.
    """
    parts: list[list[Outcome]] = [[] for _ in scorers]
    for part in judge.inputs.batches(judge.order, batch, epoch=None):
        inputs = part.inputs_BV.to(device)
        pieces = inputs.flatten(0, 1).split(at_once or len(inputs) * inputs.shape[1])
        for found, scorer in zip(parts, scorers, strict=True):
            scores = torch.cat([scorer(piece.float()) for piece in pieces])
            scores_BC = scores.unflatten(0, inputs.shape[:2]).mean(dim=1)
            found.append(of_scores(scores_BC, part.labels_B, part.index_B))
    return [joined(found) for found in parts]


def head_scores(
    head: nn.Module, device: torch.device, autocast: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    """Class probabilities of a head, fp32, for `accuracies`."""

    def scores(inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits = head(inputs)
        return logits.float().softmax(dim=-1)

    return scores


def _train_epoch(
    fitted: Sequence[FittedHead],
    optimisers: Sequence[torch.optim.Optimizer],
    plan: FitPlan,
    *,
    order: Tensor,
    epoch: int,
) -> Tensor:
    """One pass over the clips; returns per head the sums of [loss, correct, clips]."""
    num_batches = math.ceil(len(order) / plan.sweep.batch)
    sums_H3 = torch.zeros(len(fitted), 3, dtype=torch.float64)
    batches = plan.train.batches(order, plan.sweep.batch, epoch=epoch)
    for number, batch in enumerate(batches):
        done = (epoch * num_batches + number) / (plan.sweep.epochs * num_batches)
        for row, (one, optimiser) in enumerate(zip(fitted, optimisers, strict=True)):
            for group in optimiser.param_groups:
                group["lr"] = one.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            sums_H3[row] += _train_step(one.head, optimiser, batch, plan)
    return sums_H3


def _train_step(
    head: nn.Module, optimiser: torch.optim.Optimizer, batch: InputBatch, plan: FitPlan
) -> Tensor:
    inputs = batch.inputs_BV[:, 0].to(plan.device)  # training clips have one view
    labels_B = batch.labels_B.to(plan.device)
    head.train()
    num_clips, size = len(labels_B), plan.sweep.clips_at_once or len(labels_B)
    sums_3 = torch.zeros(3, dtype=torch.float64)
    optimiser.zero_grad(set_to_none=True)
    for piece, labels in zip(inputs.split(size), labels_B.split(size), strict=True):
        with torch.autocast(
            plan.device.type, dtype=plan.autocast, enabled=plan.autocast is not None
        ):
            logits_BC = head(piece.float())
        # Over all clips of the update: pieces of one add up to its gradient.
        loss = functional.cross_entropy(logits_BC.float(), labels, reduction="sum") / num_clips
        loss.backward()
        correct = (logits_BC.detach().argmax(dim=1) == labels).sum()
        sums_3 += torch.tensor([loss.item() * num_clips, correct.item(), len(labels)])
    optimiser.step()
    return sums_3


def _judge_epoch(fitted: Sequence[FittedHead], plan: FitPlan, *, epoch: int, sums: Tensor) -> None:
    for one in fitted:
        one.head.eval()
    scorers = [head_scores(one.head, plan.device, plan.autocast) for one in fitted]
    at_once = plan.sweep.clips_at_once
    # Three views of a clip, and tokens on the GPU already: few clips where few fit.
    batch = 64 if at_once is None else min(64, 4 * at_once)
    heldout: list[Accuracy | None] = [None] * len(fitted)
    if plan.heldout is not None:
        judged = outcomes(scorers, plan.heldout, device=plan.device, batch=batch, at_once=at_once)
        heldout = [outcome.accuracy for outcome in judged]
    validation = outcomes(
        scorers, plan.validation, device=plan.device, batch=batch, at_once=at_once
    )
    for row, (loss, correct, clips) in enumerate(sums.tolist()):
        one, outcome = fitted[row], validation[row]
        score = EpochScore(
            epoch=epoch + 1,
            loss=loss / max(clips, 1),
            train_top1=correct / max(clips, 1),
            heldout=heldout[row],
            validation=outcome.accuracy,
        )
        if not one.curve or score.validation.top1 > one.best_epoch.validation.top1:
            one.best = outcome
        one.last = outcome
        one.curve.append(score)
        _keep(plan.keep_best, one.head, score.validation.top1)


def _keep(best: BestWeights | None, head: nn.Module, top1: float) -> None:
    if best is None or top1 <= best.top1:
        return
    best.top1 = top1
    best.state = {name: t.detach().cpu().clone() for name, t in head.state_dict().items()}


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Weights that depend on the seed alone; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
