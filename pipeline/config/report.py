"""Configurations and their schema as text for people and as plain data for programs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config.emit import flow_text, is_block, yaml_lines
from pipeline.config.fields import ITEM, FieldDoc, leaves
from pipeline.config.load import Loaded, resolved_data
from pipeline.config.section import Section
from pipeline.config.tree import Plain

# Comments stand in one column, unless a value is wider than this.
MAX_COMMENT_COLUMN = 56
ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A key whose values differ; a side without the key has `ABSENT` as its text."""

    key: str
    left: str
    right: str


def show_text(loaded: Loaded[Any]) -> str:
    """The resolved YAML; each value's comment says where it comes from."""
    lines = list(yaml_lines(resolved_data(loaded.config)))
    widths = [len(line.text) for line in lines if line.key]
    column = max((width for width in widths if width <= MAX_COMMENT_COLUMN), default=0) + 2
    written: list[str] = []
    for line in lines:
        comment = f"# {loaded.origins.get(line.key, 'default')}" if line.key else ""
        written.append(f"{line.text:<{column}}{comment}".rstrip() + "\n")
    return "".join(written)


def show_data(loaded: Loaded[Any]) -> dict[str, Plain]:
    """`config` with every field, and `origins` of the keys that are not defaults."""
    origins = {key: str(origin) for key, origin in sorted(loaded.origins.items())}
    return {"config": resolved_data(loaded.config), "origins": origins}


def changes(left: Section, right: Section) -> list[Change]:
    """Keys with different values, in the order of the schema, keys of the right side last."""
    left_values = dict(_values(resolved_data(left), ""))
    right_values = dict(_values(resolved_data(right), ""))
    return [
        Change(
            key=key,
            left=left_values.get(key, ABSENT),
            right=right_values.get(key, ABSENT),
        )
        for key in {**left_values, **right_values}
        if left_values.get(key) != right_values.get(key)
    ]


def diff_text(found: list[Change], left_name: str, right_name: str) -> str:
    """One line per changed key with both values."""
    if not found:
        return f"{left_name} and {right_name} say the same\n"
    rows = [("", left_name, right_name), *((one.key, one.left, one.right) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "".join(
        f"{key:<{widths[0]}}  {left:<{widths[1]}}  {right}\n" for key, left, right in rows
    )


def schema_text(schema: type[Section]) -> str:
    """Every key with what it takes, its default and its sentence."""
    head = f"`{ITEM}` stands for the position of a list's item or the name of a mapping's entry.\n"
    return head + "".join(_doc_text(doc) for doc in leaves(schema))


def schema_json(schema: type[Section]) -> dict[str, Plain]:
    """The JSON Schema (draft 2020-12) of the configuration, for editors."""
    return schema.model_json_schema(mode="validation")


def _doc_text(doc: FieldDoc) -> str:
    default = "required" if doc.required else f"default {doc.default}"
    only = f" (with {doc.when})" if doc.when else ""
    sentence = f"    {doc.sentence}\n" if doc.sentence else ""
    return f"\n{doc.key}: {doc.takes}; {default}{only}\n{sentence}"


def _values(value: Plain, key: str) -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text; a list without mappings is one value."""
    if not is_block(value):
        yield key, flow_text(value)
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in pairs:
        yield from _values(child, f"{key}.{name}" if key else str(name))
