"""A checkpoint's scores on a task: features once, then every head with every seed."""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256

import torch

from pipeline.config.load import resolved_data
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.probe.annotations import Split, TaskVideos, read_task
from pipeline.probe.cache import Extraction, extract, prune
from pipeline.probe.features import CachedInputs, Features, LiveInputs
from pipeline.probe.fit import Inputs
from pipeline.probe.frozen import FrozenEncoder, load_frozen
from pipeline.probe.heads import AttentiveProbe, LinearProbe
from pipeline.probe.records import (
    ProbeProgress,
    ProbeRecord,
    ProbeRequest,
    Report,
    wilson_interval,
)
from pipeline.probe.scoring import HeadInputs, HeadScore, score_knn, score_sweep
from pipeline.probe.tasks import HeadName, Pooling
from pipeline.track.folder import write_json

CACHE_FOLDER = "cache"


def run_probe(request: ProbeRequest, *, report: Report) -> list[ProbeRecord]:
    """Probes one checkpoint and writes one file per head and seed.

    Args:
        request: Checkpoint, task, heads, seeds and where results go.
        report: Told how far each part has come.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: The task does not fit the encoder, or names what is not there.
        DataError: Annotations are wrong, or too many videos cannot be used.
        StorageError: Features or results cannot be written.
    """
    videos = read_task(request.task)
    encoder = load_frozen(request.source, request.which, request.task)
    records = evaluate(encoder, videos, request, report=report)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {request.out}: {error.strerror}") from error
    for record in records:
        write_json(request.out / record.file_name, asdict(record))
    return records


def evaluate(
    encoder: FrozenEncoder, videos: TaskVideos, request: ProbeRequest, *, report: Report
) -> list[ProbeRecord]:
    """Scores of an encoder that is loaded already; writes nothing but the features' cache."""
    _check_attention_heads(encoder, request)
    bench = _Bench(
        encoder=encoder,
        request=request,
        num_classes=len(videos.class_names),
        train=_Part.prepare(encoder, videos.train, request, report),
        validation=_Part.prepare(encoder, videos.validation, request, report),
        report=report,
    )
    prune(request.out / CACHE_FOLDER, 4 * request.task.token_cache_gib + 1)
    records: list[ProbeRecord] = []
    for head in request.heads:
        # Nearest neighbours draw nothing: another seed would give the same number again.
        for seed in request.seeds[:1] if head == "knn" else request.seeds:
            begun = time.monotonic()
            score = bench.score(head, seed)
            records.append(bench.record(head, seed, score, time.monotonic() - begun))
    return records


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One split as heads need it: pooled features, tokens, or a way to encode them."""

    split: Split
    features: Features | None
    live: LiveInputs

    @classmethod
    def prepare(
        cls, encoder: FrozenEncoder, split: Split, request: ProbeRequest, report: Report
    ) -> "_Part":
        task, training = request.task, split.name == "train"
        num_views = 1 if training else task.clip.views
        asked = Extraction(
            encoder=encoder,
            split=split,
            task=task,
            num_views=num_views,
            keep_tokens="attentive" in request.heads
            and not (training and task.augmentation.varies),
        )
        if asked.token_gib > task.token_cache_gib:
            asked = replace(asked, keep_tokens=False)
        features = None
        if asked.keep_tokens or {"linear", "knn"} & set(request.heads):
            phase = f"{request.label}: encode {split.name} videos"
            features = extract(
                asked,
                request.out / CACHE_FOLDER,
                lambda done, total: report(ProbeProgress(phase=phase, done=done, total=total)),
            )
            _check_any(split, len(features.labels_N))
        live = LiveInputs(encoder, split, task, num_views=num_views)
        return cls(split=split, features=features, live=live)

    def tokens(self, *, live: bool = False) -> Inputs:
        """All tokens: from the cache, or encoded whenever they are asked for."""
        if live or self.features is None or self.features.tokens_NVND is None:
            return self.live
        return CachedInputs(self.features.tokens_NVND, self.features.labels_N)

    def pooled(self, pooling: Pooling) -> CachedInputs:
        """One vector per clip and view, [N, V, F]."""
        if self.features is None:
            raise RuntimeError("pooled features were not prepared")
        return CachedInputs(self.features.pooled(pooling).numpy(), self.features.labels_N)

    @property
    def num_faults(self) -> int:
        found = self.features.faults if self.features else self.live.faults
        return len(self.split.faults) + len(found)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Everything that the heads of one checkpoint and task share."""

    encoder: FrozenEncoder
    request: ProbeRequest
    num_classes: int
    train: _Part
    validation: _Part
    report: Report

    def score(self, head: HeadName, seed: int) -> HeadScore:
        return {"attentive": self._attentive, "linear": self._linear, "knn": self._knn}[head](seed)

    def _attentive(self, seed: int) -> HeadScore:
        task, sweep = self.request.task, self.request.task.attentive
        build = partial(
            AttentiveProbe,
            width=self.encoder.width,
            num_classes=self.num_classes,
            num_heads=sweep.attention_heads,
            num_blocks=sweep.blocks,
        )
        inputs = self._inputs(
            self.train.tokens(live=task.augmentation.varies), self.validation.tokens()
        )
        report = self._reporter("attentive", seed)
        return score_sweep(build, inputs, task, sweep=sweep, seed=seed, report=report)

    def _linear(self, seed: int) -> HeadScore:
        task, sweep = self.request.task, self.request.task.linear
        train = self.train.pooled(sweep.pooling)
        features_NF = torch.from_numpy(train.inputs_NV[:, 0])
        build = partial(
            LinearProbe,
            mean=features_NF.mean(dim=0),
            std=features_NF.std(dim=0, correction=0),
            num_classes=self.num_classes,
        )
        inputs = self._inputs(train, self.validation.pooled(sweep.pooling))
        report = self._reporter("linear", seed)
        return score_sweep(build, inputs, task, sweep=sweep, seed=seed, report=report)

    def _knn(self, seed: int) -> HeadScore:  # noqa: ARG002 - nothing is drawn
        knn = self.request.task.knn
        train = self.train.pooled(knn.pooling)
        inputs = self._inputs(train, self.validation.pooled(knn.pooling))
        return score_knn(
            torch.from_numpy(train.inputs_NV[:, 0]), inputs, knn, num_classes=self.num_classes
        )

    def record(self, head: HeadName, seed: int, score: HeadScore, seconds: float) -> ProbeRecord:
        request = self.request
        labels_N = self.train.tokens().labels_N
        config = resolved_data(request.task)
        num_val = score.validation.num_clips
        _check_any(self.validation.split, num_val)
        return ProbeRecord(
            checkpoint=str(request.source),
            which=request.which,
            step=request.step,
            task=request.task.name,
            head=head,
            seed=seed,
            top1=score.validation.top1,
            top5=score.validation.top5 if self.num_classes > 5 else None,
            top1_interval=wilson_interval(score.validation.top1, num_val),
            chance=1 / len(labels_N.unique()),
            num_train=len(labels_N),
            num_val=num_val,
            num_classes=self.num_classes,
            num_faults={
                "train": self.train.num_faults,
                "validation": self.validation.num_faults,
            },
            rule=score.rule,
            choice=score.choice,
            curve=score.curve,
            sweep=score.sweep,
            seconds=seconds,
            encoder_digest=self.encoder.digest,
            task_digest=sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            task_config=config,
            written=time.time(),
        )

    def _inputs(self, train: Inputs, validation: Inputs) -> HeadInputs:
        return HeadInputs(
            train=train,
            validation=validation,
            device=self.encoder.device,
            autocast=self.encoder.autocast,
        )

    def _reporter(self, head: HeadName, seed: int) -> "partial[None]":
        phase = f"{self.request.label}: fit {head}, seed {seed}"
        return partial(_forward, self.report, phase)


def _forward(report: Report, phase: str, done: int, total: int) -> None:
    report(ProbeProgress(phase=phase, done=done, total=total))


def _check_any(split: Split, num_clips: int) -> None:
    if num_clips == 0:
        raise DataError(
            f"no {split.name} video of task {split.task} can be used",
            remedy="Check the task's `data` and the faults named above.",
        )


def _check_attention_heads(encoder: FrozenEncoder, request: ProbeRequest) -> None:
    heads, width = request.task.attentive.attention_heads, encoder.width
    if "attentive" not in request.heads or width % heads == 0:
        return
    fitting = [number for number in range(1, width + 1) if width % number == 0]
    nearest = min(fitting, key=lambda number: abs(number - heads))
    raise ConfigError(
        f"`attentive.attention_heads` must divide the encoder's width {width}, got {heads}; "
        f"the nearest that does is {nearest}",
        remedy=f"Set attentive.attention_heads={nearest} in the task or on the command line.",
    )
