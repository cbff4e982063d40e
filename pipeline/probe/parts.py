"""One split of a task as heads need it: pooled features, tokens, or a way to encode them."""

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.clip import SampleFault
from pipeline.errors import DataError
from pipeline.probe.annotations import Split, read_task
from pipeline.probe.cache import extract, missing_chunks, open_folder
from pipeline.probe.chunks import Extraction
from pipeline.probe.decide import TokenPlan, plan_tokens, without_tokens
from pipeline.probe.features import CachedInputs, Features, LiveInputs, StoredTokens
from pipeline.probe.fit import Inputs
from pipeline.probe.frozen import FrozenEncoder, load_frozen
from pipeline.probe.records import ProbeProgress, ProbeRequest, Report
from pipeline.probe.tasks import Pooling

CACHE_FOLDER = "cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The features of one split that a request takes, and whether they are kept at all."""

    extraction: Extraction
    plan: TokenPlan
    is_stored: bool

    @classmethod
    def of(cls, encoder: FrozenEncoder, split: Split, request: ProbeRequest) -> "Asked":
        """Decides what is kept of a split; the same on every machine of a kind."""
        task, is_training = request.task, split.name == "train"
        whole = Extraction(
            encoder=encoder,
            split=split,
            task=task,
            num_views=1 if is_training else task.clip.views,
            keep_tokens=True,
        )
        plan = plan_tokens(
            whole,
            num_seeds=len(request.seeds),
            is_varied=is_training and task.augmentation.varies,
        )
        # A head that is given is asked once: nothing is worth keeping for it.
        if "attentive" not in request.heads or request.given_head is not None:
            plan = without_tokens(plan)
        return cls(
            extraction=replace(whole, keep_tokens=plan.keep_tokens),
            plan=plan,
            is_stored=plan.keep_tokens or bool({"linear", "knn"} & set(request.heads)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A split whose features are there, as far as they are kept."""

    split: Split
    features: Features | None
    live: LiveInputs
    asked: Asked

    @classmethod
    def prepare(
        cls, encoder: FrozenEncoder, split: Split, request: ProbeRequest, report: Report
    ) -> "Part":
        """Encodes what is to be kept and is not there yet.

        Raises:
            DataError: Too many videos cannot be used.
            StorageError: Features cannot be written.
        """
        asked = Asked.of(encoder, split, request)
        features = None
        if asked.is_stored:
            report(ProbeProgress(phase="", done=0, total=0, note=asked.plan.words))
            phase = f"{request.label}: encode {split.name} videos"
            features = extract(
                asked.extraction,
                request.out / CACHE_FOLDER,
                lambda done, total: report(ProbeProgress(phase=phase, done=done, total=total)),
            )
            check_any(split, len(features.labels_N))
        num_views = asked.extraction.num_views
        live = LiveInputs(encoder, split, request.task, num_views=num_views)
        return cls(split=split, features=features, live=live, asked=asked)

    def tokens(self) -> Inputs:
        """All tokens: from the cache, or encoded whenever they are asked for."""
        if not self.asked.plan.keep_tokens or self.features is None:
            return self.live
        return StoredTokens(self.features)

    def pooled(self, pooling: Pooling) -> CachedInputs:
        """One vector per clip and view, [N, V, F]."""
        if self.features is None:
            raise RuntimeError("pooled features were not prepared")
        found = self.features
        return CachedInputs(found.pooled(pooling).numpy(), found.labels_N, found.index_N)

    @property
    def faults(self) -> tuple[SampleFault, ...]:
        """Videos that could not be used: missing, then undecodable."""
        if self.features is not None:
            return (*self.split.faults, *self.features.faults)
        found = self.live.faults
        return (*self.split.faults, *(found[index] for index in sorted(found)))

    @property
    def num_used(self) -> int:
        """Videos that heads have seen."""
        return len(self.split.videos) + len(self.split.faults) - len(self.faults)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Everything that the heads of one checkpoint and task share."""

    encoder: FrozenEncoder
    request: ProbeRequest
    class_names: tuple[str, ...]
    train: Part
    validation: Part

    @property
    def parts(self) -> tuple[Part, Part]:
        """Both splits."""
        return self.train, self.validation


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Features of one split that a request keeps on disk."""

    asked: Extraction
    folder: Path

    def missing(self) -> list[int]:
        """Numbers of the chunks that are not there, or not whole."""
        return missing_chunks(self.asked, self.folder)


def stored_extractions(request: ProbeRequest) -> list[Stored]:
    """What a request keeps on disk, so that others can encode it before the probe is run.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: The task does not fit the encoder, or names what is not there.
        DataError: Annotations are wrong.
        StorageError: The folder of the cache cannot be made.
    """
    videos = read_task(request.task)
    encoder = load_frozen(request.source, request.which, request.task)
    asked = [Asked.of(encoder, split, request) for split in (videos.train, videos.validation)]
    folders = [
        open_folder(one.extraction, request.out / CACHE_FOLDER) for one in asked if one.is_stored
    ]
    return [Stored(asked=extraction, folder=folder) for extraction, folder in folders]


def check_any(split: Split, num_clips: int) -> None:
    """Refuses a split of which nothing is left.

    Raises:
        DataError: Nothing is.
    """
    if num_clips == 0:
        raise DataError(
            f"no {split.name} video of task {split.task} can be used",
            remedy="Check the task's `data` and the faults named above.",
        )
