"""Lists of `path label` as Kinetics has them, and one folder per class as ImageNet has."""

from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.probe.entries import Entry, Lists, existing_folder, near
from pipeline.probe.stills import STILL_SUFFIXES
from pipeline.probe.tasks import CsvData, FolderData

_SUFFIXES = frozenset(
    {".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".gif", *STILL_SUFFIXES}
)


def read_csv(data: CsvData, mistakes: list[str]) -> Lists:
    """One line per video; classes have numbers and no names."""
    train, validation = (_csv_split(path, data, mistakes) for path in (data.train, data.validation))
    num_classes = 1 + max((entry.label for entry in [*train, *validation]), default=-1)
    names = tuple(str(label) for label in range(num_classes))
    return Lists(train=train, validation=validation, class_names=names)


def read_folders(data: FolderData, mistakes: list[str]) -> Lists:
    """SPLIT/CLASS/file; a class of validation that training has not got is a mistake."""
    train_dir = existing_folder(data.train, "data.train")
    names = sorted(path.name for path in train_dir.iterdir() if path.is_dir())
    if not names:
        mistakes.append(f"{train_dir}: expected one folder per class, found none")
    numbers = {name: number for number, name in enumerate(names)}
    train = _folder_split(train_dir, numbers, mistakes)
    validation_dir = existing_folder(data.validation, "data.validation")
    validation = _folder_split(validation_dir, numbers, mistakes)
    return Lists(train=train, validation=validation, class_names=tuple(names))


def _csv_split(path: Path, data: CsvData, mistakes: list[str]) -> list[Entry]:
    if not path.is_file():
        raise ConfigError(f"expected a file with one `path label` per line, found no {path}")
    root = data.videos or path.parent
    entries: list[Entry] = []
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
        entries.append(Entry(key=name.strip(), path=found, label=int(label)))
    if not entries:
        mistakes.append(f"{path}: expected at least one line `path label`")
    return entries


def _folder_split(folder: Path, numbers: dict[str, int], mistakes: list[str]) -> list[Entry]:
    entries: list[Entry] = []
    for class_dir in sorted(path for path in folder.iterdir() if path.is_dir()):
        if class_dir.name not in numbers:
            hint = near(class_dir.name, numbers)
            mistakes.append(f"{class_dir}: training has no class of this name{hint}")
            continue
        files = [path for path in class_dir.iterdir() if path.suffix.lower() in _SUFFIXES]
        if not files:
            mistakes.append(f"{class_dir}: expected videos or pictures, found none")
        # The split is part of the key: both may number their files from 1.
        entries += [
            Entry(
                key=f"{folder.name}/{class_dir.name}/{path.name}",
                path=path,
                label=numbers[class_dir.name],
            )
            for path in sorted(files)
        ]
    return entries
