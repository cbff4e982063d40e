"""A checkpoint's scores on a task: features once, then every head with every seed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from pipeline.config.load import resolved_data
from pipeline.errors import ConfigError
from pipeline.exchange.heads import HeadWeights, read_head, write_head
from pipeline.models.attentive import PROBE_EPS, AttentiveProbe
from pipeline.probe.annotations import TaskVideos, read_task
from pipeline.probe.cache import prune
from pipeline.probe.fit import Inputs
from pipeline.probe.frozen import FrozenEncoder, load_frozen
from pipeline.probe.heads import LinearProbe
from pipeline.probe.parts import CACHE_FOLDER, Part, Subject
from pipeline.probe.recording import record
from pipeline.probe.records import ProbeProgress, ProbeRecord, ProbeRequest, Report
from pipeline.probe.results import write_results
from pipeline.probe.scoring import HeadInputs, HeadScore, score_given, score_knn, score_sweep
from pipeline.probe.tasks import HeadName, TaskConfig


def run_probe(request: ProbeRequest, *, report: Report) -> list[ProbeRecord]:
    """Probes one checkpoint and writes its scores into one file, `RUN/probes/TASK-STEP-WHICH.json`.

    Args:
        request: Checkpoint, task, heads, seeds and where results go.
        report: Told how far each part has come.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: The task does not fit the encoder or the GPU, or names what is not there.
        DataError: Annotations are wrong, or too many videos cannot be used.
        StorageError: Features or results cannot be written.
    """
    videos = read_task(request.task)
    encoder = load_frozen(request.source, request.which, request.task)
    try:
        records = evaluate(encoder, videos, request, report=report)
    except torch.OutOfMemoryError as error:
        raise _memory_full(request.task, error) from error
    earlier = write_results(records, request, videos.validation)
    if earlier is not None:
        words = f"{request.label}: scores of other settings were kept as {earlier}"
        report(ProbeProgress(phase=words, done=1, total=1))
    return records


def evaluate(
    encoder: FrozenEncoder, videos: TaskVideos, request: ProbeRequest, *, report: Report
) -> list[ProbeRecord]:
    """Scores of an encoder that is loaded already.

    Writes nothing but the features' cache, and heads where they are asked for.
    """
    _check_attention_heads(encoder, request)
    subject = Subject(
        encoder=encoder,
        request=request,
        class_names=videos.class_names,
        train=Part.prepare(encoder, videos.train, request, report),
        validation=Part.prepare(encoder, videos.validation, request, report),
    )
    bench = _Bench(subject=subject, report=report)
    bench.prune_cache()
    records: list[ProbeRecord] = []
    for head in request.heads:
        # Nearest neighbours, and a head that is given, draw nothing: another seed would give the
        # same number again.
        is_drawn = head != "knn" and request.given_head is None
        for seed in request.seeds if is_drawn else request.seeds[:1]:
            begun = time.monotonic()
            score = bench.score(head, seed)
            seconds = time.monotonic() - begun
            records.append(record(bench.subject, head, seed, score, seconds))
    return records


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Fits and scores the heads of one checkpoint and task."""

    subject: Subject
    report: Report

    def score(self, head: HeadName, seed: int) -> HeadScore:
        return {"attentive": self._attentive, "linear": self._linear, "knn": self._knn}[head](seed)

    def prune_cache(self) -> None:
        """Keeps the cache to a size; what is in use stays."""
        used = [part.asked.extraction for part in self.subject.parts]
        limit = (
            4 * self.subject.request.task.token_cache_gib + 1 + 2 * sum(u.total_gib for u in used)
        )
        folder = self.subject.request.out / CACHE_FOLDER
        # With tokens or without: features that hold them also serve where none are needed.
        keys = [one.key() for used_one in used for one in used_one.both()]
        prune(folder, limit, keys)

    def _attentive(self, seed: int) -> HeadScore:
        subject, request = self.subject, self.subject.request
        sweep = request.task.attentive
        inputs = self._inputs(subject.train.tokens(), subject.validation.tokens())
        if request.given_head is not None:
            given = read_head(request.given_head)
            _check_given(given, subject)
            return score_given(given.build(), inputs, str(request.given_head))
        build = partial(
            AttentiveProbe,
            width=subject.encoder.width,
            num_classes=len(subject.class_names),
            num_heads=sweep.attention_heads,
            num_blocks=sweep.blocks,
        )
        score = score_sweep(
            build,
            replace(inputs, keep_weights=request.save_head),
            request.task,
            sweep=sweep,
            seed=seed,
            report=self._reporter("attentive", seed),
        )
        if score.weights is not None:
            write_head(request.head_path(seed), _head_weights(score, seed, subject))
        return score

    def _linear(self, seed: int) -> HeadScore:
        task, subject = self.subject.request.task, self.subject
        sweep = task.linear
        train = subject.train.pooled(sweep.pooling)
        features_NF = torch.from_numpy(train.inputs_NV[:, 0])
        build: Callable[[], nn.Module] = partial(
            LinearProbe,
            mean=features_NF.mean(dim=0),
            std=features_NF.std(dim=0, correction=0),
            num_classes=len(subject.class_names),
        )
        inputs = self._inputs(train, subject.validation.pooled(sweep.pooling))
        report = self._reporter("linear", seed)
        return score_sweep(build, inputs, task, sweep=sweep, seed=seed, report=report)

    def _knn(self, seed: int) -> HeadScore:  # noqa: ARG002 - nothing is drawn
        subject, knn = self.subject, self.subject.request.task.knn
        train = subject.train.pooled(knn.pooling)
        inputs = self._inputs(train, subject.validation.pooled(knn.pooling))
        return score_knn(
            torch.from_numpy(train.inputs_NV[:, 0]),
            inputs,
            knn,
            num_classes=len(subject.class_names),
        )

    def _inputs(self, train: Inputs, validation: Inputs) -> HeadInputs:
        return HeadInputs(
            train=train,
            validation=validation,
            device=self.subject.encoder.device,
            autocast=self.subject.encoder.autocast,
        )

    def _reporter(self, head: HeadName, seed: int) -> "partial[None]":
        phase = f"{self.subject.request.label}: fit {head}, seed {seed}"
        return partial(_forward, self.report, phase)


def _memory_full(task: TaskConfig, error: torch.OutOfMemoryError) -> ConfigError:
    sweep = task.attentive
    return ConfigError(
        f"the probe {task.name} ran out of GPU memory with encode_batch {task.encode_batch}, "
        f"attentive.batch {sweep.batch} and {sweep.clips_at_once or 'all'} of its clips at once: "
        f"{str(error).splitlines()[0]}",
        remedy="Lower attentive.clips_at_once or encode_batch, which change no score but for "
        "rounding, or sweep fewer heads at a time.",
    )


def _forward(report: Report, phase: str, done: int, total: int) -> None:
    report(ProbeProgress(phase=phase, done=done, total=total))


def _check_attention_heads(encoder: FrozenEncoder, request: ProbeRequest) -> None:
    heads, width = request.task.attentive.attention_heads, encoder.width
    is_fitted = "attentive" in request.heads and request.given_head is None
    if not is_fitted or width % heads == 0:
        return
    fitting = [number for number in range(1, width + 1) if width % number == 0]
    nearest = min(fitting, key=lambda number: abs(number - heads))
    raise ConfigError(
        f"`attentive.attention_heads` must divide the encoder's width {width}, got {heads}; "
        f"the nearest that does is {nearest}",
        remedy=f"Set attentive.attention_heads={nearest} in the task or on the command line.",
    )


def _head_weights(score: HeadScore, seed: int, subject: Subject) -> HeadWeights:
    task, chosen = subject.request.task, score.chosen
    return HeadWeights(
        tensors=score.weights or {},
        num_heads=task.attentive.attention_heads,
        norm_eps=PROBE_EPS,
        class_names=subject.class_names,
        provenance={
            "task": task.name,
            "seed": seed,
            "encoder_digest": subject.encoder.digest,
            "clip": resolved_data(task)["clip"],
            "rule": chosen.name,
            "top1": chosen.validation.accuracy.top1,
            "choice": chosen.choice,
        },
    )


def _check_given(given: HeadWeights, subject: Subject) -> None:
    width, num_classes = subject.encoder.width, len(subject.class_names)
    if (given.width, given.num_classes) == (width, num_classes):
        return
    raise ConfigError(
        f"{subject.request.given_head} is a head for width {given.width} and "
        f"{given.num_classes} classes; the encoder has width {width}, the task {num_classes} "
        "classes",
        remedy="Give a head that was fitted on this encoder and this task.",
    )
