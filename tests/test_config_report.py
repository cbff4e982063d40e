"""What `jepa config show`, `diff` and `schema` print."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.load import load_config, resolved_yaml
from pipeline.config.report import (
    Change,
    changes,
    diff_text,
    schema_json,
    schema_text,
    show_data,
    show_text,
)
from pipeline.config.section import Section


class Slow(Section):
    kind: Literal["slow"] = "slow"
    patience: int = 1
    """Seconds to wait."""


class Fast(Section):
    kind: Literal["fast"] = "fast"


class Part(Section):
    name: str
    """What it is called."""
    steps: int = Field(default=10, gt=0)


class Whole(Section):
    """A run in small."""

    folder: Path
    """Where results go."""
    sizes: tuple[int, ...] = (1, 2)
    parts: tuple[Part, ...] = ()
    mode: Annotated[Slow | Fast, Field(discriminator="kind")] = Slow(patience=5)


def loaded(folder: Path, text: str, *overrides: str):
    path = folder / "run.yaml"
    path.write_text(text)
    return load_config(path, Whole, overrides)


def test_show_gives_every_value_and_where_it_was_written(tmp_path):
    text = "folder: x\nparts:\n- name: a\n- name: b\n  steps: 3\n"
    run = tmp_path / "run.yaml"
    assert show_text(loaded(tmp_path, text, "mode.kind=fast", "parts.0.steps=4")) == (
        f"folder: x      # {run}:1\n"
        "sizes: [1, 2]  # default\n"
        "parts:\n"
        f"  - name: a    # {run}:3\n"
        "    steps: 4   # override\n"
        f"  - name: b    # {run}:4\n"
        f"    steps: 3   # {run}:5\n"
        "mode:\n"
        "  kind: fast   # override\n"
    )


def test_show_is_yaml_that_loads_back_equal(tmp_path):
    first = loaded(tmp_path, "folder: 'a # b'\nparts: [{name: a}]\n")
    assert loaded(tmp_path, show_text(first)).config == first.config
    assert loaded(tmp_path, resolved_yaml(first.config)).config == first.config


def test_show_as_data_holds_values_and_origins(tmp_path):
    data = show_data(loaded(tmp_path, "folder: x\n", "mode.patience=3"))
    assert json.loads(json.dumps(data)) == {
        "config": {
            "folder": "x",
            "sizes": [1, 2],
            "parts": [],
            "mode": {"kind": "slow", "patience": 3},
        },
        "origins": {"folder": f"{tmp_path}/run.yaml:1", "mode.patience": "override"},
    }


def test_diff_names_exactly_the_keys_that_differ_defaults_included(tmp_path):
    left = loaded(tmp_path, "folder: x\nparts: [{name: a}]\n").config
    right = loaded(
        tmp_path, "folder: x\nparts: [{name: a, steps: 3}]\nmode: {kind: fast}\nsizes: [1, 2]\n"
    ).config
    found = changes(left, right)
    assert found == [
        Change(key="parts.0.steps", left="10", right="3"),
        Change(key="mode.kind", left="slow", right="fast"),
        Change(key="mode.patience", left="5", right="(absent)"),
    ]
    assert diff_text(found, "a.yaml", "b.yaml") == (
        "               a.yaml  b.yaml\n"
        "parts.0.steps  10      3\n"
        "mode.kind      slow    fast\n"
        "mode.patience  5       (absent)\n"
    )
    assert diff_text(changes(left, left), "a", "b") == "a and b say the same\n"


def test_schema_gives_each_key_its_type_default_and_sentence():
    entries = schema_text(Whole).split("\n\n")[1:]
    assert entries == [
        "folder: a path; required\n    Where results go.",
        "sizes: a list, each item a whole number; default [1, 2]",
        "parts: a list, each item a mapping with the keys of Part; default []",
        "parts.N.name: a text; required\n    What it is called.",
        "parts.N.steps: a whole number above 0; default 10",
        "mode: a mapping with the keys of Slow or a mapping with the keys of Fast; "
        "default as below, but {patience: 5}",
        "mode.kind: 'slow'; default slow (with kind=slow)",
        "mode.patience: a whole number; default 1 (with kind=slow)\n    Seconds to wait.",
        "mode.kind: 'fast'; default fast (with kind=fast)\n",
    ]


def test_json_schema_carries_the_same_sentences_and_refuses_unknown_keys():
    schema = schema_json(Whole)
    assert schema["properties"]["folder"]["description"] == "Where results go."
    assert schema["required"] == ["folder"]
    assert schema["additionalProperties"] is False
