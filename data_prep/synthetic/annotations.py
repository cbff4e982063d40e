"""The label files of a Something-Something data set: what its official download holds.

`labels.json` maps a template without brackets to a class number as text, keys alphabetical;
`train.json` and `validation.json` are lists of objects with `id`, `label`, `template` and
`placeholders`; `test.json` has ids only, their answers stand in `test-answers.csv` (`id;label`,
no header, the label without brackets).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.synthetic.classes import bare, class_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """One video's entry."""

    video: int
    template: str
    sentence: str
    placeholders: tuple[str, ...]


def label_file(num_pairs: int) -> str:
    """Text of `labels.json`."""
    return _dump({name: str(number) for name, number in class_numbers(num_pairs).items()})


def split_file(annotations: Sequence[Annotation]) -> str:
    """Text of `train.json` or `validation.json`."""
    return _dump(
        [
            {
                "id": str(entry.video),
                "label": entry.sentence,
                "template": entry.template,
                "placeholders": list(entry.placeholders),
            }
            for entry in annotations
        ]
    )


def id_file(annotations: Sequence[Annotation]) -> str:
    """Text of `test.json`."""
    return _dump([{"id": str(entry.video)} for entry in annotations])


def answer_file(annotations: Sequence[Annotation]) -> str:
    """Text of `test-answers.csv`."""
    return "".join(f"{entry.video};{bare(entry.template)}\n" for entry in annotations)


def _dump(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
