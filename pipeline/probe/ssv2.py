"""Something-Something V2 as its official download has it, old and new file names."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.probe.entries import Entry, Lists, existing_folder, near
from pipeline.probe.tasks import SsV2Data

_OLD_PREFIX = "something-something-v2-"
_VIDEO_SUFFIXES = (".webm", ".mp4")


def read_ssv2(data: SsV2Data, mistakes: list[str]) -> Lists:
    """Class = labels[template without brackets]; the filled-in `label` text is never looked up."""
    folder = existing_folder(data.annotations, "data.annotations")
    paths = _videos_in(existing_folder(data.videos, "data.videos"))
    labels = _labels(_file(folder, "labels.json"), mistakes)
    train = _split(_file(folder, "train.json"), labels, paths, mistakes)
    if data.judged == "test":
        judged = _test_split(folder, labels, paths, mistakes)
    else:
        judged = _split(_file(folder, "validation.json"), labels, paths, mistakes)
    names = tuple(sorted(labels, key=lambda name: labels[name]))
    return Lists(train=train, validation=judged, class_names=names)


def _labels(path: Path, mistakes: list[str]) -> dict[str, int]:
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


def _split(
    path: Path, labels: dict[str, int], paths: dict[str, Path], mistakes: list[str]
) -> list[Entry]:
    raw = _json(path, mistakes)
    if not isinstance(raw, list) or not raw:
        mistakes.append(f"{path}: expected a list of objects with `id` and `template`")
        return []
    entries: list[Entry] = []
    for position, item in enumerate(raw):
        where = f"{path} entry {position}"
        if not isinstance(item, dict) or not {"id", "template"} <= item.keys():
            mistakes.append(f"{where}: expected an object with `id` and `template`")
            continue
        template = str(item["template"]).replace("[", "").replace("]", "")
        if template not in labels:
            mistakes.append(f"{where}: no class for template {template!r}{near(template, labels)}")
            continue
        key = str(item["id"])
        entries.append(Entry(key=key, path=paths.get(key), label=labels[template]))
    return entries


def _test_split(
    folder: Path, labels: dict[str, int], paths: dict[str, Path], mistakes: list[str]
) -> list[Entry]:
    """test.json has ids alone; their classes stand in a list of answers, `id;class in words`."""
    path, answers_path = _file(folder, "test.json"), _file(folder, "test-answers.csv")
    raw = _json(path, mistakes)
    if not isinstance(raw, list) or not all(isinstance(i, dict) and "id" in i for i in raw):
        mistakes.append(f"{path}: expected a list of objects with `id`")
        return []
    answers: dict[str, str] = {}
    for line in answers_path.read_text(encoding="utf-8").splitlines():
        key, _, words = line.strip().partition(";")
        answers[key] = words.replace("[", "").replace("]", "")
    entries: list[Entry] = []
    for item in raw:
        key = str(item["id"])
        name = answers.get(key)
        if name not in labels:
            told = "no answer" if name is None else f"no class {name!r}{near(name, labels)}"
            mistakes.append(f"{answers_path}: {told} for the test video {key}")
            continue
        entries.append(Entry(key=key, path=paths.get(key), label=labels[name]))
    return entries


def _file(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{_OLD_PREFIX}{name}"):
        if candidate.is_file():
            return candidate
    suffix = Path(name).suffix
    there = sorted(path.name for path in folder.glob(f"*{suffix}"))
    raise ConfigError(
        f"expected {name} or {_OLD_PREFIX}{name} in {folder}, found {there or f'no {suffix}'}",
        remedy="Point the task's `data.annotations` at the folder of the dataset's label files.",
    )


def _videos_in(folder: Path) -> dict[str, Path]:
    """Path of each video by its id; one listing instead of a look-up per video."""
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries]
    return {path.stem: path for path in sorted(paths) if path.suffix in _VIDEO_SUFFIXES}


def _json(path: Path, mistakes: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        mistakes.append(f"{path}: not JSON: {error}")
        return None
