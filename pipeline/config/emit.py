"""Plain data to YAML text, one line per key, so that a line can carry a comment on its key."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.scalars import scalar_text
from pipeline.config.tree import Plain

INDENT = "  "


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of YAML and the dotted key whose value ends on it; empty if it only opens one."""

    text: str
    key: str


def yaml_lines(data: dict[str, Plain]) -> Iterator[Line]:
    """The lines of a mapping. Lists that hold no mapping are written in one line."""
    for name, value in data.items():
        yield from _entry(f"{scalar_text(name)}:", value, name, "")


def is_block(value: Plain) -> bool:
    """Whether a value is written over several lines: it holds a mapping with keys."""
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, list) and any(is_block(item) for item in value)


def flow_text(value: Plain) -> str:
    """A value in one line."""
    if isinstance(value, list):
        return f"[{', '.join(flow_text(item) for item in value)}]"
    if isinstance(value, dict):
        pairs = (f"{scalar_text(name)}: {flow_text(item)}" for name, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    return scalar_text(value)


def _entry(head: str, value: Plain, key: str, indent: str) -> Iterator[Line]:
    if not is_block(value):
        yield Line(text=f"{indent}{head} {flow_text(value)}", key=key)
        return
    yield Line(text=indent + head, key="")
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _entry(f"{scalar_text(name)}:", child, f"{key}.{name}", indent + INDENT)
        return
    for position, child in enumerate(value):
        yield from _item(child, f"{key}.{position}", indent + INDENT)


def _item(value: Plain, key: str, indent: str) -> Iterator[Line]:
    """`- name: …` with the mapping's first key on the dash's line."""
    if not isinstance(value, dict) or not value:
        yield from _entry("-", value, key, indent)
        return
    for count, (name, child) in enumerate(value.items()):
        lines = _entry(f"{scalar_text(name)}:", child, f"{key}.{name}", indent + INDENT)
        first = next(lines)
        if count == 0:
            first = Line(text=f"{indent}- {first.text.lstrip()}", key=first.key)
        yield first
        yield from lines
