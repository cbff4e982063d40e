"""Which video belongs to which class: the annotation files of a probe task, read and checked."""

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.clip import SampleFault
from pipeline.errors import ConfigError, DataError
from pipeline.probe.tasks import CsvData, SsV2Data, TaskConfig

_OLD_PREFIX = "something-something-v2-"
_VIDEO_SUFFIXES = (".webm", ".mp4")
_SHOWN_MISTAKES = 20
_SUBSET_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledVideo:
    """One video of a split. `key` is its id in the annotations."""

    key: str
    path: Path
    label: int


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A line of an annotation file, before its video was looked for."""

    key: str
    path: Path | None
    label: int


def read_task(config: TaskConfig) -> TaskVideos:
    """Read, check and, where the task limits them, thin out the annotations of a task.

    Raises:
        ConfigError: A folder or file named in the task does not exist.
        DataError: The annotations are wrong (all mistakes together), or more videos are missing
            than the task tolerates.
    """
    mistakes: list[str] = []
    if isinstance(config.data, SsV2Data):
        train, validation, names = _read_ssv2(config.data, mistakes)
    else:
        train, validation, names = _read_csv(config.data, mistakes)
    mistakes += _split_mistakes(train, validation)
    if mistakes:
        _raise_mistakes(config.name, mistakes)
    return TaskVideos(
        train=_split(config, "train", train, config.max_train),
        validation=_split(config, "validation", validation, config.max_validation),
        class_names=tuple(names),
    )


def _read_ssv2(data: SsV2Data, mistakes: list[str]) -> tuple[list[_Entry], list[_Entry], list[str]]:
    """Class = labels[template without brackets]; the filled-in `label` text is never looked up."""
    folder = _existing_folder(data.annotations, "data.annotations")
    paths = _videos_in(_existing_folder(data.videos, "data.videos"))
    labels = _ssv2_labels(_ssv2_file(folder, "labels"), mistakes)
    splits = [
        _ssv2_split(_ssv2_file(folder, name), labels, paths, mistakes)
        for name in ("train", "validation")
    ]
    return splits[0], splits[1], sorted(labels, key=lambda name: labels[name])


def _ssv2_labels(path: Path, mistakes: list[str]) -> dict[str, int]:
    raw = _json(path, mistakes)
    if not isinstance(raw, dict) or not raw:
        mistakes.append(f"{path}: expected an object from template to class number")
        return {}
    labels: dict[str, int] = {}
    for template, number in raw.items():
        if str(number).isdecimal():
            labels[template] = int(number)
        else:
            mistakes.append(f"{path}: expected a class number for {template!r}, got {number!r}")
    if sorted(labels.values()) != list(range(len(raw))):
        mistakes.append(f"{path}: expected the class numbers 0 to {len(raw) - 1}, each once")
    return labels


def _ssv2_split(
    path: Path, labels: dict[str, int], paths: dict[str, Path], mistakes: list[str]
) -> list[_Entry]:
    raw = _json(path, mistakes)
    if not isinstance(raw, list) or not raw:
        mistakes.append(f"{path}: expected a list of objects with `id` and `template`")
        return []
    entries: list[_Entry] = []
    for position, item in enumerate(raw):
        where = f"{path} entry {position}"
        if not isinstance(item, dict) or not {"id", "template"} <= item.keys():
            mistakes.append(f"{where}: expected an object with `id` and `template`")
            continue
        template = str(item["template"]).replace("[", "").replace("]", "")
        if template not in labels:
            mistakes.append(f"{where}: no class for template {template!r}{_near(template, labels)}")
            continue
        key = str(item["id"])
        entries.append(_Entry(key=key, path=paths.get(key), label=labels[template]))
    return entries


def _read_csv(data: CsvData, mistakes: list[str]) -> tuple[list[_Entry], list[_Entry], list[str]]:
    splits = [_csv_split(path, data, mistakes) for path in (data.train, data.validation)]
    num_classes = 1 + max((entry.label for split in splits for entry in split), default=-1)
    return splits[0], splits[1], [str(label) for label in range(num_classes)]


def _csv_split(path: Path, data: CsvData, mistakes: list[str]) -> list[_Entry]:
    if not path.is_file():
        raise ConfigError(f"expected a file with one `path label` per line, found no {path}")
    root = data.videos or path.parent
    entries: list[_Entry] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(data.delimiter)
        if not name or not label.isdecimal():
            mistakes.append(
                f"{path}:{number}: expected `path{data.delimiter}class number`, got {line!r}"
            )
            continue
        video = root / name.strip()
        found = video if video.is_file() else None
        entries.append(_Entry(key=name.strip(), path=found, label=int(label)))
    if not entries:
        mistakes.append(f"{path}: expected at least one line `path label`")
    return entries


def _split_mistakes(train: list[_Entry], validation: list[_Entry]) -> list[str]:
    mistakes: list[str] = []
    for name, entries in (("train", train), ("validation", validation)):
        twice = len(entries) - len({entry.key for entry in entries})
        if twice:
            mistakes.append(f"{name}: {twice} videos are listed more than once")
    shared = sorted({e.key for e in train} & {e.key for e in validation})
    if shared:
        mistakes.append(
            f"{len(shared)} videos are in train and in validation, for example {shared[0]}: "
            "scores would count what was learned by heart"
        )
    return mistakes


def _split(config: TaskConfig, name: str, entries: list[_Entry], limit: int | None) -> Split:
    chosen = entries if limit is None else _thin_out(entries, limit)
    videos: list[LabelledVideo] = []
    faults: list[SampleFault] = []
    for position, entry in enumerate(chosen):
        if entry.path is not None:
            videos.append(LabelledVideo(key=entry.key, path=entry.path, label=entry.label))
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


def _thin_out(entries: list[_Entry], limit: int) -> list[_Entry]:
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


def _ssv2_file(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.json", folder / f"{_OLD_PREFIX}{name}.json"):
        if candidate.is_file():
            return candidate
    there = sorted(path.name for path in folder.glob("*.json"))
    raise ConfigError(
        f"expected {name}.json or {_OLD_PREFIX}{name}.json in {folder}, found {there or 'no JSON'}",
        remedy="Point the task's `data.annotations` at the folder of the dataset's JSON files.",
    )


def _videos_in(folder: Path) -> dict[str, Path]:
    """Path of each video by its id; one listing instead of a look-up per video."""
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries]
    return {path.stem: path for path in sorted(paths) if path.suffix in _VIDEO_SUFFIXES}


def _existing_folder(folder: Path, key: str) -> Path:
    if not folder.is_dir():
        near = _near(folder.name, [path.name for path in folder.parent.glob("*")])
        raise ConfigError(
            f"expected a folder at the task's `{key}`, found none at {folder.resolve()}{near}",
            remedy=f"Correct `{key}` in the task file or on the command line: {key}=FOLDER.",
        )
    return folder


def _json(path: Path, mistakes: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        mistakes.append(f"{path}: not JSON: {error}")
        return None


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def _raise_mistakes(task: str, mistakes: list[str]) -> None:
    more = len(mistakes) - _SHOWN_MISTAKES
    listed = "\n".join(f"  {mistake}" for mistake in mistakes[:_SHOWN_MISTAKES])
    raise DataError(
        f"the annotations of task {task} have {len(mistakes)} mistakes:\n{listed}"
        + (f"\n  and {more} more" if more > 0 else ""),
        remedy="Correct or fetch the annotation files again.",
    )
