"""Labelled samples of our own shards, and their bytes."""

from functools import lru_cache
from pathlib import Path

from pipeline.data.format import BadMediaError, ShardIndex
from pipeline.errors import DataError
from pipeline.probe.entries import Entry, Lists, existing_folder
from pipeline.probe.tasks import ShardData

_SHOWN = 5


def read_shards(data: ShardData, mistakes: list[str]) -> Lists:
    """One entry per sample; the class is a label of its sidecar, by its word."""
    train = [_labels_of(folder, "data.train", data.label, mistakes) for folder in data.train]
    judged = [
        _labels_of(folder, "data.validation", data.label, mistakes) for folder in data.validation
    ]
    names = sorted({label for part in (*train, *judged) for label in part.labels.values()})
    numbers = {name: number for number, name in enumerate(names)}
    return Lists(
        train=[entry for part in train for entry in part.entries(numbers)],
        validation=[entry for part in judged for entry in part.entries(numbers)],
        class_names=tuple(names),
    )


def read_sample(folder: Path, sample: int) -> bytes:
    """The video of a sample, checked against its checksum.

    Raises:
        BadMediaError: It is damaged.
    """
    index = open_dataset(folder)
    return index.read_member(index.record(sample))


def dataset_digest(folder: Path) -> str:
    """Identity of a dataset's content."""
    return open_dataset(folder).digest


@lru_cache(maxsize=16)
def open_dataset(folder: Path) -> ShardIndex:
    """An opened dataset, kept for the life of the process."""
    return ShardIndex.open(folder)


class _Labelled:
    """The samples of one dataset and the word that each is labelled with."""

    def __init__(self, folder: Path, keys: list[str], labels: dict[int, str]) -> None:
        self.folder, self.keys, self.labels = folder, keys, labels

    def entries(self, numbers: dict[str, int]) -> list[Entry]:
        return [
            Entry(
                key=f"{self.folder.name}/{self.keys[sample]}",
                path=self.folder,
                label=numbers[word],
                sample=sample,
            )
            for sample, word in self.labels.items()
        ]


def _labels_of(folder: Path, key: str, name: str, mistakes: list[str]) -> _Labelled:
    index = open_dataset(existing_folder(folder, key))
    keys: list[str] = []
    labels: dict[int, str] = {}
    unlabelled: list[str] = []
    seen: set[str] = set()
    for sample in range(len(index)):
        record = index.record(sample)
        keys.append(record.key)
        try:
            found = index.read_sidecar(record).labels or {}
        except BadMediaError as error:
            raise DataError(
                f"{folder}: the sidecar of {record.key} cannot be read: {error}",
                remedy="Check the dataset with `jepa prep lint`.",
            ) from error
        seen |= set(found)
        if name in found:
            labels[sample] = str(found[name])
        else:
            unlabelled.append(record.key)
    if unlabelled:
        there = f"their labels are {', '.join(sorted(seen))}" if seen else "they have no labels"
        mistakes.append(
            f"{folder}: {len(unlabelled)} of {len(index)} samples have no label {name!r}, for "
            f"example {', '.join(unlabelled[:_SHOWN])}; {there}"
        )
    return _Labelled(folder, keys, labels)
