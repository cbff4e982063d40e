"""What is wrong with a configuration, in sentences: expected, got, and the nearest right word."""

import difflib
import functools
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.fields import (
    ITEM,
    FieldDoc,
    choices_of,
    describe,
    keys_of,
    leaves,
    options_of,
    step_into,
)
from pipeline.config.scalars import Scalar, resolve_scalar, scalar_text
from pipeline.config.section import Section
from pipeline.config.tree import Mistake, Node, Plain, plain

# difflib's own default; lower values propose words that share little but vowels.
NEAREST = 0.6
MAX_VALUE_CHARACTERS = 60
_YAML_1_1_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_NULL_WORDS = frozenset({"none", "nil", "nan", "off"})


def mistakes_of(error: ValidationError, root: Node, schema: type[Section]) -> list[Mistake]:
    """Every error of a validation, one sentence per key, at the line where the key stands."""
    found: dict[tuple[str, str], Mistake] = {}
    data = plain(root)
    for details in error.errors(include_url=False):
        place = _Place(root, data, schema)
        place.follow(details)
        if _follows_from_others(details, place):
            continue
        mistake = _mistake(details, place, schema)
        # The members of a union complain one by one; the sentence names all of them already.
        found.setdefault((mistake.key, mistake.problem), mistake)
    return list(found.values())


def unknown_key(path: Sequence[str], annotation: Any, value: Plain, schema: type[Section]) -> str:
    """The sentence for a key that its place does not have.

    Args:
        path: The key with all above it.
        annotation: What stands above the key.
        value: The keys and values beside it.
        schema: The section the whole file is, to look for the key elsewhere.
    """
    key = path[-1]
    known = keys_of(annotation, value)
    # A key that is already written would be repeated, so the others are asked first.
    free = [name for name in known if not (isinstance(value, dict) and name in value)]
    if near := nearest(key, free) or nearest(key, known):
        return f"expected a known key, got {key!r}; did you mean {near!r}?"
    elsewhere = _docs_by_name(schema).get(key, [])
    for doc in elsewhere:
        if doc.when and _is_at(doc.key.split("."), path):
            return f"expected a known key, got {key!r}, which needs {doc.when}"
    if elsewhere:
        return f"expected a known key, got {key!r}; did you mean {elsewhere[0].key!r}?"
    return f"expected one of {', '.join(known) or 'no keys at all'}, got {key!r}"


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate most like `word`, whatever its case, or None if none is near."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=NEAREST)
    return by_lower[close[0]] if close else None


def shown(value: Plain) -> str:
    """A value in a sentence: scalars as YAML writes them, the rest by its size."""
    if isinstance(value, dict):
        return "a mapping of " + (", ".join(map(str, value)) or "no keys")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str) else scalar_text(value)
    if len(text) > MAX_VALUE_CHARACTERS:
        text = text[:MAX_VALUE_CHARACTERS] + "…"
    return f"the text {text}" if isinstance(value, str) else text


def _follows_from_others(details: ErrorDetails, place: "_Place") -> bool:
    """Whether a list is called too short only because pydantic left its wrong items out."""
    if details["type"] != "too_short" or not isinstance(place.data, list):
        return False
    return len(place.data) >= details.get("ctx", {})["min_length"]


def _mistake(details: ErrorDetails, place: "_Place", schema: type[Section]) -> Mistake:
    return Mistake(
        origin=place.origin, key=".".join(place.path), problem=_problem(details, place, schema)
    )


class _Place:
    """Walks tree and annotations side by side along pydantic's location of an error."""

    def __init__(self, root: Node, data: Plain, schema: type[Section]) -> None:
        self.path: list[str] = []
        self.origin = root.origin
        self.node: Node | None = root
        self.data: Plain = data
        self.annotation: Any = schema
        self.above: Any = schema
        self.above_data: Plain = None

    def follow(self, details: ErrorDetails) -> None:
        """To the key that an error is about."""
        for part in details["loc"]:
            self.descend(part)
        if details["type"] in ("union_tag_not_found", "union_tag_invalid"):
            self.descend(details.get("ctx", {})["discriminator"].strip("'"))

    def descend(self, part: str | int) -> None:
        """One part further; the names of a union's members are not keys and are passed over."""
        child = None if self.node is None else self.node.child(str(part))
        data = self.data
        below = None if self.annotation is None else step_into(self.annotation, part, data)
        if child is None and below is None:
            return
        self.path.append(str(part))
        self.above, self.above_data = self.annotation, data
        self.annotation, self.node = below, child
        self.data = None
        if child is not None:
            self.origin = child.origin
            self.data = data[part if isinstance(data, dict) else int(part)]


def _problem(details: ErrorDetails, place: _Place, schema: type[Section]) -> str:
    kind = details["type"]
    if kind == "extra_forbidden":
        siblings = dict(place.above_data or {})
        siblings.pop(place.path[-1], None)
        return unknown_key(place.path, place.above, siblings, schema)
    got = "nothing" if place.node is None else shown(place.data)
    if kind in ("value_error", "assertion_error"):
        said = str(details.get("ctx", {}).get("error") or details["msg"])
        is_scalar = place.node is not None and not place.node.children() and place.path
        return f"{said}; got {got}" if is_scalar else said
    if kind == "finite_number":
        return f"expected a finite number, got {got}"
    expected = describe(place.annotation) if place.annotation is not None else details["msg"]
    problem = f"expected {expected}, got {got}"
    if place.node is not None and (near := _nearest_value(place.data, place.annotation)):
        problem += f"; did you mean {near}?"
    return problem


@functools.cache
def _docs_by_name(schema: type[Section]) -> dict[str, list[FieldDoc]]:
    found: dict[str, list[FieldDoc]] = {}
    for doc in leaves(schema):
        found.setdefault(doc.key.rpartition(".")[2], []).append(doc)
    return found


def _is_at(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a documented key, with `ITEM` for any item, is the key at `path`."""
    return len(pattern) == len(path) and all(
        part in (ITEM, name) for part, name in zip(pattern, path, strict=True)
    )


def _nearest_value(value: Plain, annotation: Any) -> str | None:
    """The value that was probably meant, as it would be written."""
    options = options_of(annotation)
    if isinstance(value, float) and value.is_integer() and int in options:
        return str(int(value))
    if not isinstance(value, str):
        return None
    if near := nearest(value, [str(choice) for choice in choices_of(annotation)]):
        return repr(near)
    return _nearest_scalar(value.strip(), options)


def _nearest_scalar(text: str, options: list[Any]) -> str | None:
    if bool in options and text.lower() in _YAML_1_1_BOOLEANS:
        return _YAML_1_1_BOOLEANS[text.lower()]
    if type(None) in options and text.lower() in _NULL_WORDS:
        return "null"
    meant: Scalar = resolve_scalar(text.replace("_", "").replace(",", ""))
    if type(meant) in options or (type(meant) is int and float in options):
        return None if isinstance(meant, str) else scalar_text(meant)
    return None
