"""What the sections' classes say about keys: which there are, what they take, and their sentences.

Everything here reads annotations; a union of sections is narrowed by the literal fields (`kind`)
that the data gives.
"""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from pipeline.config.emit import flow_text
from pipeline.config.section import Section
from pipeline.config.tree import Plain

ITEM = "N"
"""Stands for any position of a list, or any name of a mapping, in a key's path."""

_NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
}
_BOUNDS = (
    ("gt", "above"),
    ("ge", "at least"),
    ("lt", "below"),
    ("le", "at most"),
    ("multiple_of", "a multiple of"),
    ("min_length", "of length at least"),
    ("max_length", "of length at most"),
    ("pattern", "matching"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldDoc:
    """One key of the schema; `default` is text, empty where `required`."""

    key: str
    takes: str
    required: bool
    default: str
    sentence: str
    is_section: bool
    when: str = ""
    """For a key of one alternative of a union: the literal that chooses it, `kind=jepa`."""


def step_into(annotation: Any, key: str | int, value: Plain) -> Any | None:
    """The annotation one key below, or None if there is no such key.

    Args:
        annotation: What stands at a place of the schema.
        key: A field's name, a mapping's key or a list's position.
        value: The data at that place, to choose among a union's sections; may be None.
    """
    found: list[Any] = []
    for option in _fitting(annotation, value):
        if _is_section(option):
            field = option.model_fields.get(str(key))
            below = None if field is None else whole_annotation(field)
        else:
            below = _item(option, key)
        if below is not None and below not in found:
            found.append(below)
    return Union[tuple(found)] if found else None  # noqa: UP007  built at run time


def keys_of(annotation: Any, value: Plain) -> tuple[str, ...]:
    """Names that may be written at a place, in the order of their fields; empty if free or none."""
    names: dict[str, None] = {}
    for option in _fitting(annotation, value):
        if _is_section(option):
            names.update(dict.fromkeys(option.model_fields))
    return tuple(names)


def default_of(annotation: Any, key: str, value: Plain) -> Plain:
    """The default of a section's field as plain data; None if it has none."""
    for option in _fitting(annotation, value):
        if _is_section(option) and key in option.model_fields:
            return plain_default(option.model_fields[key])
    return None


def plain_default(field: FieldInfo) -> Plain:
    """A field's default as plain data; None if it is required."""
    if field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values of the literals and enumerations that a place takes."""
    found: list[Any] = []
    for option in options_of(annotation):
        if get_origin(option) is Literal:
            found.extend(get_args(option))
        elif isinstance(option, type) and issubclass(option, Enum):
            found.extend(member.value for member in option)
    return tuple(found)


def describe(annotation: Any) -> str:
    """What a place takes, in words: `a whole number above 0 or null`."""
    choices = choices_of(annotation)
    words = [repr(choice) if isinstance(choice, str) else str(choice) for choice in choices]
    for option, bounds in _bounded_options(annotation, ()):
        if not choices_of(option):
            words.append(_bounded(_noun(option), " and ".join(bounds)))
    # "… or null" reads best, and two members of a union may share their words.
    unique = sorted(dict.fromkeys(words), key=lambda word: word == "null")
    return " or ".join([", ".join(unique[:-1]), unique[-1]]) if len(unique) > 1 else unique[0]


def leaves(schema: type[Section]) -> Iterator[FieldDoc]:
    """Every key of a schema, sections before their own keys; items of lists are called `N`."""
    yield from _leaves_of(schema, "", "", (schema,))


def whole_annotation(field: FieldInfo) -> Any:
    """A field's annotation together with its bounds, which pydantic keeps apart."""
    if not field.metadata:
        return field.annotation
    return Annotated[field.annotation, *field.metadata]


def options_of(annotation: Any) -> list[Any]:
    """The members of a union, one for anything else, bounds left off."""
    return [option for option, _ in _bounded_options(annotation, ())]


def _bounded_options(annotation: Any, bounds: tuple[str, ...]) -> list[tuple[Any, tuple[str, ...]]]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        return _bounded_options(inner, (*bounds, *_bounds_in(metadata)))
    if origin in (Union, types.UnionType):
        return [pair for part in get_args(annotation) for pair in _bounded_options(part, bounds)]
    # A bound of `int | None` says nothing of null.
    return [(annotation, () if annotation is type(None) else bounds)]


def _bounds_in(metadata: list[Any]) -> list[str]:
    found: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            found.extend(_bounds_in(item.metadata))
            continue
        for name, word in _BOUNDS:
            bound = getattr(item, name, None)
            if bound is not None:
                found.append(f"{word} {bound}")
    return found


def _fitting(annotation: Any, value: Plain) -> list[Any]:
    """The union's members, without sections whose literals contradict the data."""
    options = options_of(annotation)
    if not isinstance(value, dict):
        return options
    fitting = [option for option in options if not _is_section(option) or _agrees(option, value)]
    return fitting or options


def _agrees(section: type[Section], value: dict[str, Plain]) -> bool:
    for name, field in section.model_fields.items():
        if get_origin(field.annotation) is not Literal or len(get_args(field.annotation)) > 1:
            continue
        if name in value and value[name] not in get_args(field.annotation):
            return False
    return True


def _item(option: Any, key: str | int) -> Any | None:
    origin, parts = get_origin(option), get_args(option)
    if origin is dict:
        return parts[1]
    if origin not in (list, tuple) or not (str(key).isdecimal() or key == ITEM):
        return None
    if origin is list or parts[-1] is Ellipsis:
        return parts[0]
    if key == ITEM:
        return Union[parts]  # noqa: UP007  built at run time
    return parts[int(key)] if int(key) < len(parts) else None


def _bounded(noun: str, bounds: str) -> str:
    if not bounds:
        return noun
    return f"{noun} ({bounds})" if "," in noun else f"{noun} {bounds}"


def _noun(option: Any) -> str:
    if _is_section(option):
        return "a mapping with the keys of " + option.__name__
    origin, parts = get_origin(option), get_args(option)
    if origin is dict:
        return f"a mapping of names, each to {describe(parts[1])}"
    if origin is list or (origin is tuple and parts[-1] is Ellipsis):
        return f"a list, each item {describe(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}: {'; '.join(describe(part) for part in parts)}"
    return _NOUNS.get(option) or f"a value of type {getattr(option, '__name__', option)}"


def _leaves_of(
    section: type[Section], prefix: str, when: str, above: tuple[Any, ...]
) -> Iterator[FieldDoc]:
    for name, field in section.model_fields.items():
        annotation = whole_annotation(field)
        below = list(_sections_below(annotation, prefix + name))
        yield FieldDoc(
            key=prefix + name,
            takes=describe(annotation),
            required=field.is_required(),
            default=_default_text(field),
            sentence=" ".join((field.description or "").split()),
            is_section=bool(below),
            when=when,
        )
        for option, path in below:
            if option not in above:
                kind = _kind(option) if len(below) > 1 else ""
                yield from _leaves_of(option, path + ".", kind or when, (*above, option))


def _sections_below(annotation: Any, path: str) -> Iterator[tuple[type[Section], str]]:
    for option in options_of(annotation):
        if _is_section(option):
            yield option, path
            continue
        below = _item(option, ITEM)
        if below is not None:
            yield from _sections_below(below, f"{path}.{ITEM}")


def _default_text(field: FieldInfo) -> str:
    """A section's keys follow with their own defaults, so only what differs from them is said."""
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True, validated_data={})
    if not isinstance(default, Section):
        return flow_text(plain_default(field))
    differing = default.model_dump(mode="json", exclude_defaults=True)
    return f"as below, but {flow_text(differing)}" if differing else "as below"


def _kind(section: type[Section]) -> str:
    for name, field in section.model_fields.items():
        values = get_args(field.annotation)
        if get_origin(field.annotation) is Literal and len(values) == 1:
            return f"{name}={values[0]}"
    return section.__name__


def _is_section(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Section)
