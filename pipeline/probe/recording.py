"""What a head's answers come to: the record that is written, shown and compared."""

import json
import time
from hashlib import sha256
from typing import Any

from pipeline.clip import SampleFault
from pipeline.config.load import resolved_data
from pipeline.probe.annotations import Split
from pipeline.probe.outcome import Outcome
from pipeline.probe.parts import Part, Subject, check_any
from pipeline.probe.records import ClassScore, HardClip, ProbeRecord, wilson_interval
from pipeline.probe.scoring import Chosen, HeadScore
from pipeline.probe.tasks import HeadName

_NUM_HARDEST = 8


def record(
    subject: Subject, head: HeadName, seed: int, score: HeadScore, seconds: float
) -> ProbeRecord:
    """The record of one head and seed.

    Raises:
        DataError: Not one validation video could be used.
    """
    request, chosen, parts = subject.request, score.chosen, subject.parts
    outcome, num_classes = chosen.validation, len(subject.class_names)
    found, config = outcome.accuracy, resolved_data(request.task)
    check_any(subject.validation.split, found.num_clips)
    return ProbeRecord(
        checkpoint=str(request.source),
        which=request.which,
        step=request.step,
        task=request.task.name,
        # Not beside a head that was fitted here, as if it were another seed of it.
        head=head if request.given_head is None else "given",
        seed=seed,
        top1=found.top1,
        top5=found.top5 if num_classes > 5 else None,
        top1_interval=wilson_interval(found.top1, found.num_clips),
        chance=1 / len({video.label for video in subject.train.split.videos}),
        num_train=subject.train.num_used,
        num_val=found.num_clips,
        num_classes=num_classes,
        class_names=subject.class_names,
        num_faults={part.split.name: len(part.faults) for part in parts},
        faults=[_fault(part, fault) for part in parts for fault in part.faults],
        features=[part.asked.plan.words for part in parts],
        rule=chosen.words,
        rules=[_rule(one, num_classes) for one in score.by_rule],
        choice=chosen.choice,
        curve=score.curve,
        sweep=score.sweep,
        per_class=_per_class(outcome, subject.class_names),
        confusion=outcome.confusion(),
        hardest=_hardest(outcome, subject.validation.split),
        seconds=seconds,
        encoder_digest=subject.encoder.digest,
        task_digest=_digest(config),
        task_config=config,
        written=time.time(),
    )


def _digest(config: object) -> str:
    """Of the settings that are there: a later version's optional key, unset, is no other task."""
    return sha256(json.dumps(_without_unset(config), sort_keys=True).encode()).hexdigest()


def _without_unset(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_unset(one) for key, one in value.items() if one is not None}


def _per_class(outcome: Outcome, names: tuple[str, ...]) -> list[ClassScore]:
    counts = outcome.per_class(len(names))
    return [
        ClassScore(name=name, num_clips=clips, num_right=right)
        for name, (clips, right) in zip(names, counts, strict=True)
    ]


def _hardest(outcome: Outcome, split: Split) -> list[HardClip]:
    return [
        HardClip(
            key=split.videos[place].key,
            position=place,
            label=label,
            predicted=predicted,
            share=share,
        )
        for place, label, predicted, share in outcome.hardest(_NUM_HARDEST)
    ]


def _rule(one: Chosen, num_classes: int) -> dict[str, Any]:
    found = one.validation.accuracy
    return {
        "rule": one.name,
        "words": one.words,
        "choice": one.choice,
        "top1": found.top1,
        "top5": found.top5 if num_classes > 5 else None,
    }


def _fault(part: Part, fault: SampleFault) -> dict[str, str]:
    return {
        "split": part.split.name,
        "key": fault.key,
        "path": fault.shard if fault.shard != part.split.name else "",
        "reason": fault.reason,
    }
