"""Which video belongs to which class: the two splits of a probe task, checked and thinned out."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.clip import SampleFault
from pipeline.errors import DataError
from pipeline.probe.entries import Entry, Lists
from pipeline.probe.folders import read_csv, read_folders
from pipeline.probe.shards import read_shards
from pipeline.probe.ssv2 import read_ssv2
from pipeline.probe.tasks import CsvData, FolderData, SsV2Data, TaskConfig

_SHOWN_MISTAKES = 20
_SUBSET_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledVideo:
    """One video of a split. `key` is its id in the annotations."""

    key: str
    path: Path
    label: int
    sample: int | None = None
    """Its number in the dataset at `path`, where it lies in shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The videos of one split that are there, in a fixed order, and those that are missing."""

    task: str
    name: str
    videos: tuple[LabelledVideo, ...]
    faults: tuple[SampleFault, ...]
    max_faults: int

    def fault(self, position: int, video: LabelledVideo, reason: str) -> SampleFault:
        """Names one video of this split that cannot be used."""
        return SampleFault(
            position=position,
            dataset=self.task,
            shard=str(video.path),
            key=video.key,
            reason=reason,
        )

    def check_faults(self, faults: Iterable[SampleFault]) -> None:
        """Stops once more videos are bad than the task tolerates.

        Raises:
            DataError: Names the count, the budget and the first few videos.
        """
        faults = list(faults)
        if len(faults) <= self.max_faults:
            return
        total = len(self.videos) + len(self.faults)
        examples = "; ".join(f"{fault.key}: {fault.reason}" for fault in faults[:5])
        raise DataError(
            f"{len(faults)} of the {total} {self.name} videos of task {self.task} cannot be used, "
            f"{self.max_faults} are tolerated. The first: {examples}",
            remedy="Mend or fetch those videos, or raise the task's `max_bad_share`.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskVideos:
    """Both splits of a task; `class_names` are indexed by label."""

    train: Split
    validation: Split
    class_names: tuple[str, ...]


def read_task(config: TaskConfig) -> TaskVideos:
    """Read, check and, where the task limits them, thin out the annotations of a task.

    Raises:
        ConfigError: A folder or file named in the task does not exist.
        DataError: The annotations are wrong (all mistakes together), or more videos are missing
            than the task tolerates.
    """
    mistakes: list[str] = []
    lists = _read(config, mistakes)
    mistakes += _split_mistakes(lists)
    if mistakes:
        _raise_mistakes(config.name, mistakes)
    return TaskVideos(
        train=_split(config, "train", lists.train, config.max_train),
        validation=_split(config, "validation", lists.validation, config.max_validation),
        class_names=lists.class_names,
    )


def _read(config: TaskConfig, mistakes: list[str]) -> Lists:
    data = config.data
    if isinstance(data, SsV2Data):
        return read_ssv2(data, mistakes)
    if isinstance(data, CsvData):
        return read_csv(data, mistakes)
    if isinstance(data, FolderData):
        return read_folders(data, mistakes)
    return read_shards(data, mistakes)


def _split_mistakes(lists: Lists) -> list[str]:
    mistakes: list[str] = []
    for name, entries in (("train", lists.train), ("validation", lists.validation)):
        twice = len(entries) - len({entry.key for entry in entries})
        if twice:
            mistakes.append(f"{name}: {twice} videos are listed more than once")
    shared = sorted({e.key for e in lists.train} & {e.key for e in lists.validation})
    if shared:
        mistakes.append(
            f"{len(shared)} videos are in train and in validation, for example {shared[0]}: "
            "scores would count what was learned by heart"
        )
    return mistakes


def _split(config: TaskConfig, name: str, entries: list[Entry], limit: int | None) -> Split:
    chosen = entries if limit is None else _thin_out(entries, limit)
    videos: list[LabelledVideo] = []
    faults: list[SampleFault] = []
    for position, entry in enumerate(chosen):
        if entry.path is not None:
            videos.append(
                LabelledVideo(
                    key=entry.key, path=entry.path, label=entry.label, sample=entry.sample
                )
            )
            continue
        faults.append(
            SampleFault(
                position=position, dataset=config.name, shard=name, key=entry.key, reason="missing"
            )
        )
    split = Split(
        task=config.name,
        name=name,
        videos=tuple(videos),
        faults=tuple(faults),
        max_faults=int(config.max_bad_share * len(chosen)),
    )
    split.check_faults(faults)
    return split


def _thin_out(entries: list[Entry], limit: int) -> list[Entry]:
    """At most `limit` entries, as even over the classes as can be, always the same ones.

    Entries get a random place within their class; those with the lowest places are taken.
    """
    order = np.random.default_rng(_SUBSET_SEED).permutation(len(entries))
    place_in_class: dict[int, int] = {}
    places = np.zeros(len(entries), dtype=np.int64)
    for index in order:
        label = entries[index].label
        place = place_in_class.get(label, 0)
        places[index] = place
        place_in_class[label] = place + 1
    rank = np.lexsort((np.argsort(order), places))
    return [entries[index] for index in sorted(rank[:limit])]


def _raise_mistakes(task: str, mistakes: list[str]) -> None:
    more = len(mistakes) - _SHOWN_MISTAKES
    listed = "\n".join(f"  {mistake}" for mistake in mistakes[:_SHOWN_MISTAKES])
    raise DataError(
        f"the annotations of task {task} have {len(mistakes)} mistakes:\n{listed}"
        + (f"\n  and {more} more" if more > 0 else ""),
        remedy="Correct or fetch the annotation files again.",
    )
