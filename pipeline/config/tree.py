"""Plain values in a tree in which every value knows where it was written."""

from dataclasses import dataclass
from typing import Any, TypeAlias

from pipeline.config.scalars import Scalar

Plain: TypeAlias = Any
"""What JSON can say: dictionaries with text keys, lists and scalars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a value was written: a line of a file, an override, or nowhere (a default)."""

    file: str | None = None
    line: int | None = None
    override: str | None = None

    def __str__(self) -> str:
        if self.override is not None:
            return "override"
        return "default" if self.file is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """One wrong thing in a configuration, with its place."""

    origin: Origin
    key: str
    problem: str

    def __str__(self) -> str:
        override = self.origin.override
        place = str(self.origin) if override is None else f"override {override}"
        return ": ".join(part for part in (place, self.key, self.problem) if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A value with its origin.

    `size` and `height` count its values and levels with aliases unfolded.
    """

    value: "Scalar | dict[str, Node] | list[Node]"
    origin: Origin
    size: int = 1
    height: int = 0

    def children(self) -> "list[tuple[str, Node]]":
        """Keys (or positions, as text) and values below; empty for a scalar."""
        if isinstance(self.value, dict):
            return list(self.value.items())
        if isinstance(self.value, list):
            return [(str(position), node) for position, node in enumerate(self.value)]
        return []

    def child(self, key: str) -> "Node | None":
        """The value below a key, or below a position given as text."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and key.isdecimal() and int(key) < len(self.value):
            return self.value[int(key)]
        return None


def plain(node: Node) -> Plain:
    """The tree without origins."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def from_plain(data: Plain, origin: Origin) -> Node:
    """A tree whose every value has the same origin."""
    if isinstance(data, dict):
        return branch({str(key): from_plain(value, origin) for key, value in data.items()}, origin)
    if isinstance(data, list):
        return branch([from_plain(value, origin) for value in data], origin)
    return Node(value=data, origin=origin)


def branch(value: dict[str, Node] | list[Node], origin: Origin) -> Node:
    """A mapping or list with its size and height added up."""
    children = value.values() if isinstance(value, dict) else value
    return Node(
        value=value,
        origin=origin,
        size=1 + sum(child.size for child in children),
        height=1 + max((child.height for child in children), default=0),
    )


def origins_of(root: Node) -> dict[str, Origin]:
    """Every written key, dotted, and where; list items by position (`stages.0.steps`)."""
    found: dict[str, Origin] = {}
    pending = root.children()
    while pending:
        dotted, node = pending.pop()
        found[dotted] = node.origin
        pending.extend((f"{dotted}.{key}", child) for key, child in node.children())
    return found
