"""One head on given inputs: fit the sweep, choose its best by both rules, score on validation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.probe.fit import (
    BestWeights,
    EpochScore,
    FitPlan,
    FittedHead,
    Inputs,
    Judge,
    fit_sweep,
    head_scores,
    outcomes,
)
from pipeline.probe.heads import knn_scores
from pipeline.probe.outcome import Outcome
from pipeline.probe.tasks import KnnConfig, SweepConfig, TaskConfig

RuleName = Literal["held-out", "best-on-validation", "fixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadInputs:
    """What a head is fitted and scored on, and where it computes."""

    train: Inputs
    validation: Inputs
    device: torch.device
    autocast: torch.dtype | None
    keep_weights: bool = False
    """Keep the weights of the chosen head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The best head by one rule, and what it says on validation."""

    name: RuleName
    words: str
    choice: dict[str, float]
    validation: Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadScore:
    """A head's answers on validation, and how it was chosen."""

    by_rule: tuple[Chosen, ...]
    """The task's own rule first."""
    curve: list[dict[str, float | None]]
    """The chosen head, epoch by epoch; a loss that is not finite is None."""
    sweep: list[dict[str, float | None]]
    """Every head of the sweep with what it was judged by."""
    weights: dict[str, Tensor] | None = None
    """Of the chosen head, on the CPU, if they were asked for."""

    @property
    def chosen(self) -> Chosen:
        """The best head by the task's own rule."""
        return self.by_rule[0]


def score_sweep(
    build: Callable[[], nn.Module],
    inputs: HeadInputs,
    task: TaskConfig,
    *,
    sweep: SweepConfig,
    seed: int,
    report: Callable[[int, int], None],
) -> HeadScore:
    """Fits a sweep once and chooses its best head by both rules, the task's own first.

    Args:
        build: Makes a head.
        inputs: Clips to fit on and to score on.
        task: The rule, and the share of clips that are held out.
        sweep: The heads.
        seed: Draws the heads' weights, the order of clips, and which are held out.
        report: Told epochs done and their total.
    """
    labels_N, num_val = inputs.train.labels_N, len(inputs.validation.labels_N)
    order, heldout = torch.arange(len(labels_N)), None
    if task.heldout_share > 0:
        order, held = split_heldout(labels_N, task.heldout_share, seed)
        heldout = Judge(inputs=inputs.train, order=held)
    best = BestWeights() if inputs.keep_weights and task.selection == "validation" else None
    plan = FitPlan(
        train=inputs.train,
        order=order,
        heldout=heldout,
        validation=Judge(inputs=inputs.validation, order=torch.arange(num_val)),
        sweep=sweep,
        seed=seed,
        device=inputs.device,
        autocast=inputs.autocast,
        keep_best=best,
    )
    fitted = fit_sweep(build, plan, report)
    return _score(fitted, task, best, keep_weights=inputs.keep_weights)


def score_knn(
    train_NF: Tensor, inputs: HeadInputs, knn: KnnConfig, *, num_classes: int
) -> HeadScore:
    """Nearest neighbours have nothing to fit: their score depends on no seed."""
    train_NF = train_NF.to(inputs.device)
    labels_N = inputs.train.labels_N.to(inputs.device)

    def scores(query_QF: Tensor) -> Tensor:
        return knn_scores(
            train_NF,
            labels_N,
            query_QF,
            num_classes=num_classes,
            k=knn.k,
            temperature=knn.temperature,
        )

    words = "nothing is chosen: one setting, fixed before"
    choice = {"k": knn.k, "temperature": knn.temperature}
    return _fixed(scores, inputs.validation, inputs.device, words, choice)


def score_given(head: nn.Module, inputs: HeadInputs, source: str) -> HeadScore:
    """A head that was fitted elsewhere, on this task's validation clips."""
    scorer = head_scores(head.to(inputs.device).eval(), inputs.device, inputs.autocast)
    words = f"nothing is fitted: the head of {source}"
    return _fixed(scorer, inputs.validation, inputs.device, words, {})


def split_heldout(labels_N: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Clips to fit on and clips to choose by, classes in equal proportion, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels_N), generator=generator)
    by_class = shuffled[labels_N[shuffled].argsort(stable=True)]
    # Walking through the clips class by class, each crossing of a whole number holds one out.
    crossing = ((torch.arange(len(labels_N)) + 1) * share).floor()
    held = torch.diff(crossing, prepend=torch.zeros(1)) > 0
    if not held.any():
        held[0] = True
    return by_class[~held].sort().values, by_class[held].sort().values


def _fixed(
    scorer: Callable[[Tensor], Tensor],
    validation: Inputs,
    device: torch.device,
    words: str,
    choice: dict[str, float],
) -> HeadScore:
    judge = Judge(inputs=validation, order=torch.arange(len(validation.labels_N)))
    (outcome,) = outcomes([scorer], judge, device=device)
    fixed = Chosen(name="fixed", words=words, choice=choice, validation=outcome)
    return HeadScore(by_rule=(fixed,), curve=[], sweep=[])


def _score(
    fitted: list[FittedHead], task: TaskConfig, best: BestWeights | None, *, keep_weights: bool
) -> HeadScore:
    winners = {"validation": max(fitted, key=lambda one: one.best_epoch.validation.top1)}
    rules = {"validation": _on_validation(winners["validation"], len(fitted))}
    if task.heldout_share > 0:
        winners["heldout"] = max(fitted, key=lambda one: _last_heldout(one) or 0.0)
        rules["heldout"] = _on_heldout(winners["heldout"], len(fitted), task.heldout_share)
    own = task.selection
    weights = None
    if keep_weights:
        weights = best.state if best is not None else _state(winners[own].head)
    return HeadScore(
        by_rule=(rules[own], *(rule for name, rule in rules.items() if name != own)),
        curve=[_point(score) for score in winners[own].curve],
        sweep=[_row(one) for one in fitted],
        weights=weights,
    )


def _on_validation(one: FittedHead, num_heads: int) -> Chosen:
    return Chosen(
        name="best-on-validation",
        words=f"best of {num_heads} heads and {len(one.curve)} epochs on validation itself",
        choice=_choice(one) | {"epoch": one.best_epoch.epoch},
        validation=_there(one.best),
    )


def _on_heldout(one: FittedHead, num_heads: int, share: float) -> Chosen:
    return Chosen(
        name="held-out",
        words=(
            f"best of {num_heads} heads after the last epoch on {share:.0%} of the training "
            "clips, held out; the choice does not see validation"
        ),
        choice=_choice(one),
        validation=_there(one.last),
    )


def _there(outcome: Outcome | None) -> Outcome:
    if outcome is None:
        raise RuntimeError("a head was asked for its score before it was judged")
    return outcome


def _last_heldout(one: FittedHead) -> float | None:
    found = one.curve[-1].heldout
    return found.top1 if found is not None else None


def _choice(one: FittedHead) -> dict[str, float]:
    return {"learning_rate": one.learning_rate, "weight_decay": one.weight_decay}


def _row(one: FittedHead) -> dict[str, float | None]:
    return {
        **_choice(one),
        "heldout_top1": _last_heldout(one),
        "last_top1": one.curve[-1].validation.top1,
        "best_top1": one.best_epoch.validation.top1,
        "best_epoch": one.best_epoch.epoch,
        "loss": _finite(one.curve[-1].loss),
    }


def _point(score: EpochScore) -> dict[str, float | None]:
    return {
        "epoch": score.epoch,
        "loss": _finite(score.loss),
        "train_top1": score.train_top1,
        "heldout_top1": score.heldout.top1 if score.heldout is not None else None,
        "validation_top1": score.validation.top1,
    }


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _state(head: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}
