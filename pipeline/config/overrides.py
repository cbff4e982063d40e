"""`key.sub=value` from the command line, laid over the tree of a file."""

from collections.abc import Sequence
from typing import Any

from pipeline.config.fields import default_of, step_into
from pipeline.config.mistakes import shown
from pipeline.config.parse import parse_tree
from pipeline.config.section import Section
from pipeline.config.tree import (
    Mistake,
    Node,
    Origin,
    branch,
    from_plain,
    plain,
)


def apply_overrides(
    root: Node, overrides: Sequence[str], schema: type[Section]
) -> tuple[Node, list[Mistake]]:
    """The tree with every override in its place, the last one of a key winning.

    An override changes its own key only: what a missing section or list would have been by
    default is filled in around it.
    """
    mistakes: list[Mistake] = []
    for override in overrides:
        try:
            root = _applied(root, override, schema)
        except _OverrideError as error:
            mistakes.extend(error.mistakes)
    return (_without_stray_defaults(root, schema) if overrides else root), mistakes


class _OverrideError(Exception):
    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__("; ".join(map(str, mistakes)))
        self.mistakes = mistakes


def _applied(root: Node, override: str, schema: type[Section]) -> Node:
    origin = Origin(override=override)
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        problem = "expected key=value or key.sub=value"
        raise _OverrideError([Mistake(origin=origin, key="", problem=problem)])
    parsed = parse_tree(text, lambda _: origin, path=tuple(parts))
    if parsed.root is None or parsed.mistakes:
        raise _OverrideError(parsed.mistakes)
    return _Setter(parsed.root, origin).set(root, schema, parts, [])


def _without_stray_defaults(node: Node, annotation: Any) -> Node:
    """Drops filled-in defaults of one alternative of a union after an override chose another."""
    data = plain(node)
    kept: list[tuple[str, Node]] = []
    for key, child in node.children():
        below = None if annotation is None else step_into(annotation, key, data)
        if below is not None or child.origin != Origin():
            kept.append((key, _without_stray_defaults(child, below)))
    if isinstance(node.value, dict):
        return branch(dict(kept), node.origin)
    return branch([child for _, child in kept], node.origin) if kept else node


class _Setter:
    """Rebuilds the branches from the root to one key; shared (aliased) nodes stay untouched.

    An unknown key is set like any other: the validation of the whole finds it, with its origin.
    """

    def __init__(self, value: Node, origin: Origin) -> None:
        self.value = value
        self.origin = origin

    def set(self, node: Node, annotation: Any, rest: list[str], path: list[str]) -> Node:
        if not rest:
            return self.value
        key, data = rest[0], plain(node)
        below = None if annotation is None else step_into(annotation, key, data)
        if isinstance(node.value, list):
            items = list(node.value)
            position = self._position(key, items, path)
            items[position] = self.set(items[position], below, rest[1:], [*path, key])
            return branch(items, node.origin)
        if not isinstance(node.value, dict):
            raise self._error(
                path, f"expected a section or list to set {key!r} in, got {shown(data)}"
            )
        child = node.value.get(key)
        if child is None or (child.value is None and len(rest) > 1):
            default = default_of(annotation, key, data)
            opened = branch({}, self.origin)
            child = opened if default is None else from_plain(default, Origin())
        changed = self.set(child, below, rest[1:], [*path, key])
        return branch({**node.value, key: changed}, node.origin)

    def _position(self, key: str, items: list[Node], path: list[str]) -> int:
        if key.isdecimal() and int(key) < len(items):
            return int(key)
        held = f"0 to {len(items) - 1}" if items else "none: the list is empty"
        raise self._error([*path, key], f"expected a position of the list ({held}), got {key!r}")

    def _error(self, path: list[str], problem: str) -> _OverrideError:
        return _OverrideError([Mistake(origin=self.origin, key=".".join(path), problem=problem)])
