"""What every reader of annotations gives, and the refusals they share."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of an annotation file; `path` is None where its video is missing."""

    key: str
    path: Path | None
    label: int
    sample: int | None = None
    """Number in the dataset at `path`, where it lies in shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lists:
    """The entries of both splits; `class_names` are indexed by label."""

    train: list[Entry]
    validation: list[Entry]
    class_names: tuple[str, ...]


def existing_folder(folder: Path, key: str) -> Path:
    """Refuses a folder that is not there.

    Raises:
        ConfigError: With the task's key and the nearest name beside it.
    """
    if not folder.is_dir():
        hint = near(folder.name, [path.name for path in folder.parent.glob("*")])
        raise ConfigError(
            f"expected a folder at the task's `{key}`, found none at {folder.resolve()}{hint}",
            remedy=f"Correct `{key}` in the task file or on the command line: {key}=FOLDER.",
        )
    return folder


def near(word: str, known: Iterable[str]) -> str:
    """The nearest known word, as the end of a sentence; empty if none is."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; the nearest is {found[0]!r}" if found else ""
