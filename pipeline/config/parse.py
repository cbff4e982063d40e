"""YAML text to a tree of plain values with their lines.

YAML 1.2 core scalars only: `5e-4` is a number, `24:00:00`, `yes` and `2026-01-01` are texts. Tags
are refused, aliases are counted as often as they are used, and size and depth are bounded, so a
configuration can neither build objects nor blow up in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from pipeline.config.scalars import resolve_scalar
from pipeline.config.tree import Mistake, Node, Origin, branch

# A resolved run has some 200 values in 5 levels; reading as many as this takes half a second.
MAX_NODES = 5_000
MAX_DEPTH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """A text's tree, or None if it is not YAML, and everything wrong with the text."""

    root: Node | None
    mistakes: list[Mistake]


def parse_tree(text: str, place: Callable[[int], Origin], path: tuple[str, ...] = ()) -> Parsed:
    """Read one YAML document, null if empty; mistakes are collected, none is raised.

    Args:
        text: The document.
        place: Makes the origin of a 1-based line.
        path: The key that the text is the value of, for mistakes; none for a whole file.
    """
    builder = _Builder(place)
    try:
        root = builder.document(YAML(typ="safe", pure=True).parse(text), path)
    except _LimitError as error:
        return Parsed(root=None, mistakes=[*builder.mistakes, error.mistake])
    except (YAMLError, ValueError, OverflowError) as error:  # the last two: "\U99999999"
        mistake = Mistake(
            origin=place(_error_line(error, text)),
            key=".".join(path),
            problem=_syntax_problem(error),
        )
        return Parsed(root=None, mistakes=[*builder.mistakes, mistake])
    return Parsed(root=root, mistakes=builder.mistakes)


class _LimitError(Exception):
    def __init__(self, mistake: Mistake) -> None:
        super().__init__(str(mistake))
        self.mistake = mistake


@dataclass(slots=True)
class _Builder:
    """Folds parser events into nodes. Events come lazily, so a limit stops the parser too."""

    place: Callable[[int], Origin]
    mistakes: list[Mistake] = field(default_factory=list)
    anchors: dict[str, Node] = field(default_factory=dict)
    num_nodes: int = 0

    def document(self, events: Iterator[Event], path: tuple[str, ...]) -> Node:
        root: Node | None = None
        for event in events:
            if isinstance(event, DocumentStartEvent) and root is not None:
                self._mistake(event, "", "expected one YAML document, got a second one (---)")
                break
            if isinstance(event, NodeEvent):
                root = self._node(event, events, path)
        return root or Node(value=None, origin=self.place(1))

    def _node(self, event: Event, events: Iterator[Event], path: tuple[str, ...]) -> Node:
        if isinstance(event, AliasEvent):
            node = self._alias(event, path)
        else:
            self._refuse_tag(event, path)
            self._count(event, 1, len(path))
            node = self._value(event, events, path)
            if isinstance(event, NodeEvent) and event.anchor is not None:
                self.anchors[event.anchor] = node
        return node

    def _value(self, event: Event, events: Iterator[Event], path: tuple[str, ...]) -> Node:
        origin = self._origin(event)
        if isinstance(event, MappingStartEvent):
            return branch(self._mapping(events, path), origin)
        if isinstance(event, SequenceStartEvent):
            return branch(self._sequence(events, path), origin)
        quoted = bool(getattr(event, "style", None))
        text = str(getattr(event, "value", ""))
        return Node(value=text if quoted else resolve_scalar(text), origin=origin)

    def _mapping(self, events: Iterator[Event], path: tuple[str, ...]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for event in events:
            if isinstance(event, MappingEndEvent):
                break
            key = self._key(event, events, path)
            value = self._node(next(events), events, (*path, key or "?"))
            if key is None:
                continue
            if key in found:
                first = found[key].origin
                problem = f"expected each key once, got it again (first at {first}); remove one"
                self._mistake(event, ".".join((*path, key)), problem)
                continue
            # The key's line, not the value's: that is where a person looks for it.
            found[key] = replace(value, origin=self._origin(event))
        return found

    def _key(self, event: Event, events: Iterator[Event], path: tuple[str, ...]) -> str | None:
        """The key's text as written, or None after noting why it cannot be one."""
        dotted = ".".join(path)
        if not isinstance(event, ScalarEvent):
            self._node(event, events, (*path, "?"))
            self._mistake(event, dotted, "expected a word as key, got a list, mapping or alias")
            return None
        self._refuse_tag(event, path)
        if event.value == "<<" and not event.style:
            problem = "expected a key, got '<<' (merge keys are not YAML 1.2); write the keys out"
            self._mistake(event, dotted, problem)
            return None
        return str(event.value)

    def _sequence(self, events: Iterator[Event], path: tuple[str, ...]) -> list[Node]:
        found: list[Node] = []
        for event in events:
            if isinstance(event, SequenceEndEvent):
                break
            found.append(self._node(event, events, (*path, str(len(found)))))
        return found

    def _alias(self, event: AliasEvent, path: tuple[str, ...]) -> Node:
        node = self.anchors.get(str(event.anchor))
        if node is None:
            problem = f"expected an anchor &{event.anchor} completed above, got none"
            self._mistake(event, ".".join(path), problem)
            return Node(value=None, origin=self._origin(event))
        self._count(event, node.size, len(path) + node.height)
        return node

    def _refuse_tag(self, event: Event, path: tuple[str, ...]) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            problem = f"expected a plain value, got the tag {tag}; remove the tag"
            self._mistake(event, ".".join(path), problem)

    def _count(self, event: Event, size: int, depth: int) -> None:
        self.num_nodes += size
        if self.num_nodes <= MAX_NODES and depth <= MAX_DEPTH:
            return
        limits = f"{MAX_NODES} values and {MAX_DEPTH} levels"
        problem = f"expected at most {limits} with aliases unfolded, got more"
        raise _LimitError(Mistake(origin=self._origin(event), key="", problem=problem))

    def _origin(self, event: Event) -> Origin:
        return self.place(_line(event.start_mark))

    def _mistake(self, event: Event, key: str, problem: str) -> None:
        self.mistakes.append(Mistake(origin=self._origin(event), key=key, problem=problem))


def _line(mark: Any) -> int:
    """1-based line of a parser's mark; marks are 0-based."""
    return 1 if mark is None else int(mark.line) + 1


def _error_line(error: Exception, text: str) -> int:
    if isinstance(error, MarkedYAMLError):
        return _line(error.problem_mark or error.context_mark)
    if isinstance(error, ReaderError):
        return text.count("\n", 0, error.position) + 1
    return 1


def _syntax_problem(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError):
        parts = [str(part) for part in (error.context, error.problem) if part]
        return f"expected YAML, got a syntax error: {', '.join(parts)}"
    if isinstance(error, ReaderError):
        return "expected readable text, got a control character or half a character"
    return f"expected YAML, got {error}"
