"""Unquoted YAML text to a value and back, by the core schema of YAML 1.2 (section 10.3.2)."""

import json
import math
import re
from typing import TypeAlias

Scalar: TypeAlias = str | int | float | bool | None

# Longer digits are no number that a run needs, and converting them takes quadratic time.
MAX_NUMBER_CHARACTERS = 64

_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(?:(inf|Inf|INF)|(nan|NaN|NAN))")
# Texts that no YAML reader, 1.1 ones included, takes for anything else.
_PLAIN_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*")
_YAML_1_1_BOOLEANS = frozenset({"y", "n", "yes", "no", "on", "off"})
# Printable for every reader, so that a written file never depends on its reader's tables.
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")


def resolve_scalar(text: str) -> Scalar:
    """The value of an unquoted text: null, boolean, integer, number, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > MAX_NUMBER_CHARACTERS:
        return text
    for pattern, base in ((_DECIMAL, 10), (_OCTAL, 8), (_HEXADECIMAL, 16)):
        if pattern.fullmatch(text):
            return int(text if base == 10 else text[2:], base)
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _NOT_FINITE.fullmatch(text):
        return float(special[1] + "inf") if special[2] else float("nan")
    return text


def scalar_text(value: Scalar) -> str:
    """How `value` is written so that `resolve_scalar`, or a quoted reading, gives it back."""
    if not isinstance(value, str):
        return _number_text(value) if isinstance(value, float) else json.dumps(value)
    ambiguous = not isinstance(resolve_scalar(value), str) or value.lower() in _YAML_1_1_BOOLEANS
    if _PLAIN_TEXT.fullmatch(value) and not ambiguous:
        return value
    return _NOT_ASCII.sub(_escaped, json.dumps(value, ensure_ascii=False))


def _number_text(value: float) -> str:
    return ".nan" if math.isnan(value) else repr(value).replace("inf", ".inf")


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
