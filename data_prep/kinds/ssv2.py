"""Kind `ssv2`: Something-Something V2 as it is downloaded, in either set of file names.

Every video gets the filled-in sentence as its caption and `class` (a number), `template`,
`placeholders` and `split` as labels. Test videos have no sentence and get their split alone, and
the class where test-answers.csv is there.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.kinds.listing import (
    Listing,
    about_everything,
    base_name,
    mistake,
    opened_file,
    parent_of,
    rows_of,
    source_at,
    status_of,
)
from data_prep.records import Labels, Source
from pipeline.errors import UsageError

SPLITS = ("train", "validation", "test")
_PREFIXES = ("", "something-something-v2-")
_VIDEO_FOLDERS = ("videos", "20bn-something-something-v2", ".")
_VIDEO_SUFFIXES = (".webm", ".mp4")


def table_of(root: str, split: str) -> str | None:
    """The annotation file of a split below a root or its folder `labels`, if there."""
    for folder in (root, f"{root}/labels", f"{root}/annotations"):
        for prefix in _PREFIXES:
            path = f"{folder}/{prefix}{split}.json"
            if status_of(path) is not None:
                return path
    return None


def is_layout(root: str) -> bool:
    """Whether a folder holds the data set: a split with its list of classes."""
    return table_of(root, "train") is not None and table_of(root, "labels") is not None


def sources(path: str, listing: Listing) -> Iterator[Source]:
    """The videos of a split: the one whose file is named, `train` for a folder.

    Raises:
        UsageError: A file is missing or not as documented.
    """
    table = path if path.endswith(".json") else table_of(path, "train")
    if table is None:
        raise UsageError(
            f"{path}: no train.json and no something-something-v2-train.json there or in labels/",
            remedy="Name the folder of the data set, or one split's file: ssv2:FOLDER/train.json.",
        )
    split = next((one for one in SPLITS if Path(table).stem.endswith(one)), Path(table).stem)
    classes = _classes(table)
    answers = _answers(table) if split == "test" else {}
    folder = listing.videos or _video_folder(path)
    entries = _json(table)
    if not isinstance(entries, list):
        raise mistake(table, None, "a list of videos", type(entries).__name__)
    for row, entry in enumerate(entries, start=1):
        identity, labels, text = _read(table, row, entry, classes, answers)
        facts = {
            "labels": {**labels, "split": split},
            "captions": about_everything(text, "ssv2"),
        }
        yield from _video(identity, f"{base_name(table)}, row {row}", folder, listing, **facts)


def _video(
    identity: str, why: str, folder: str, listing: Listing, **facts: Any
) -> Iterator[Source]:
    for suffix in _VIDEO_SUFFIXES:
        locator = f"{folder}/{identity}{suffix}"
        if status_of(locator) is not None:
            source = source_at(f"{identity}{suffix}", locator, listing, why, **facts)
            if source is not None:
                yield source
            return
    listing.on_other(identity, f"{why}: no {identity}.webm and no {identity}.mp4 in {folder}")


def _read(
    table: str, row: int, entry: Any, classes: dict[str, int], answers: dict[str, str]
) -> tuple[str, Labels, str]:
    identity = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(identity, str) or not identity or "/" in identity:
        raise mistake(table, row, 'an object with an "id" in digits', entry)
    template = entry.get("template", answers.get(identity))
    if template is None:
        return identity, {}, ""
    # Only the filled-in sentence has the placeholders' words; classes are named by templates.
    key = str(template).replace("[", "").replace("]", "")
    if key not in classes:
        raise mistake(table, row, "a template that labels.json lists", template)
    labels: Labels = {"class": classes[key], "template": key}
    placeholders = entry.get("placeholders", [])
    if not isinstance(placeholders, list):
        raise mistake(table, row, "a list of placeholders", placeholders)
    if placeholders:
        labels["placeholders"] = "; ".join(str(one) for one in placeholders)
    return identity, labels, str(entry.get("label", ""))


def _classes(table: str) -> dict[str, int]:
    path = table_of(parent_of(table), "labels")
    if path is None:
        raise UsageError(
            f"{table}: no labels.json beside it",
            remedy="Put the data set's labels.json (or something-something-v2-labels.json) there.",
        )
    found = _json(path)
    try:
        return {str(template): int(number) for template, number in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise mistake(path, None, 'an object of template: "class number"', str(error)) from error


def _answers(table: str) -> dict[str, str]:
    path = f"{parent_of(table)}/test-answers.csv"
    if status_of(path) is None:
        return {}
    answers = {}
    with opened_file(path) as file:
        for row, line in rows_of(file):
            identity, separator, template = line.partition(";")
            if not separator:
                raise mistake(path, row, "`id;label`", line)
            answers[identity] = template
    return answers


def _video_folder(path: str) -> str:
    root = parent_of(path) if path.endswith(".json") else path
    roots = [root, parent_of(root)] if path.endswith(".json") else [root]
    for base in roots:
        for name in _VIDEO_FOLDERS[:-1]:
            if os.path.isdir(f"{base}/{name}"):  # noqa: PTH112 - or an address, which is none
                return f"{base}/{name}"
    return root


def _json(path: str) -> Any:
    with opened_file(path) as file:
        content = file.read()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise mistake(path, None, "JSON", str(error)) from error
