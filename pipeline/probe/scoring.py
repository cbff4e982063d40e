"""One head on given inputs: fit the sweep, choose by the task's rule, score on validation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.probe.fit import (
    Accuracy,
    EpochScore,
    FitPlan,
    FittedHead,
    Inputs,
    Judge,
    accuracies,
    fit_sweep,
    head_scores,
)
from pipeline.probe.heads import knn_scores
from pipeline.probe.tasks import KnnConfig, SweepConfig, TaskConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadInputs:
    """What a head is fitted and scored on, and where it computes."""

    train: Inputs
    validation: Inputs
    device: torch.device
    autocast: torch.dtype | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadScore:
    """Accuracy on validation, and how the scored head was chosen."""

    validation: Accuracy
    rule: str
    choice: dict[str, float]
    curve: list[dict[str, float | None]]
    """The chosen head, epoch by epoch; a loss that is not finite is None."""
    sweep: list[dict[str, float]]
    """Every head of the sweep with the accuracy it was judged by."""


def score_sweep(
    build: Callable[[], nn.Module],
    inputs: HeadInputs,
    task: TaskConfig,
    *,
    sweep: SweepConfig,
    seed: int,
    report: Callable[[int, int], None],
) -> HeadScore:
    """Fits a sweep and scores its best head by the task's rule."""
    all_clips = torch.arange(len(inputs.train.labels_N))
    whole_validation = Judge(
        inputs=inputs.validation, order=torch.arange(len(inputs.validation.labels_N))
    )
    if task.selection == "validation":
        order, judge = all_clips, whole_validation
    else:
        order, held = split_heldout(inputs.train.labels_N, task.heldout_share, seed)
        judge = Judge(inputs=inputs.train, order=held)
    plan = FitPlan(
        train=inputs.train,
        order=order,
        judge=judge,
        sweep=sweep,
        seed=seed,
        device=inputs.device,
        autocast=inputs.autocast,
    )
    fitted = fit_sweep(build, plan, report)
    if task.selection == "validation":
        return _best_on_validation(fitted)
    return _best_on_heldout(fitted, whole_validation, plan, task.heldout_share)


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

    judge = Judge(inputs=inputs.validation, order=torch.arange(len(inputs.validation.labels_N)))
    return HeadScore(
        validation=accuracies([scores], judge, device=inputs.device)[0],
        rule="nothing is chosen: one setting, fixed before",
        choice={"k": knn.k, "temperature": knn.temperature},
        curve=[],
        sweep=[],
    )


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


def _best_on_validation(fitted: list[FittedHead]) -> HeadScore:
    best = max(fitted, key=lambda one: max(score.judged.top1 for score in one.curve))
    epoch = max(best.curve, key=lambda score: score.judged.top1)
    return HeadScore(
        validation=epoch.judged,
        rule=f"best of {len(fitted)} heads and {len(best.curve)} epochs on validation itself",
        choice=_choice(best) | {"epoch": epoch.epoch},
        curve=[_point(score, "validation_top1") for score in best.curve],
        sweep=[_choice(one) | {"top1": max(s.judged.top1 for s in one.curve)} for one in fitted],
    )


def _best_on_heldout(
    fitted: list[FittedHead], validation: Judge, plan: FitPlan, share: float
) -> HeadScore:
    best = max(fitted, key=lambda one: one.curve[-1].judged.top1)
    scorer = head_scores(best.head.eval(), plan.device, plan.autocast)
    return HeadScore(
        validation=accuracies([scorer], validation, device=plan.device)[0],
        rule=(
            f"best of {len(fitted)} heads after the last epoch on {share:.0%} of the training "
            "clips, held out; validation seen once"
        ),
        choice=_choice(best),
        curve=[_point(score, "heldout_top1") for score in best.curve],
        sweep=[_choice(one) | {"top1": one.curve[-1].judged.top1} for one in fitted],
    )


def _choice(one: FittedHead) -> dict[str, float]:
    return {"learning_rate": one.learning_rate, "weight_decay": one.weight_decay}


def _point(score: EpochScore, judged: str) -> dict[str, float | None]:
    return {
        "epoch": score.epoch,
        "loss": score.loss if math.isfinite(score.loss) else None,
        "train_top1": score.train_top1,
        judged: score.judged.top1,
    }
