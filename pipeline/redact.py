"""Keeps secrets out of what a run writes down: its records, its messages, its saved configuration.

Two nets. What stands in an environment variable with a secret's name is known word for word and
is blanked wherever it turns up; the rest is recognised by its form: passwords in addresses, signed
addresses, `Authorization` headers, and values behind names such as `password`.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

BLANK = "***"
# Shorter values are words that occur by themselves, such as `true`.
_MIN_SECRET_CHARACTERS = 8
_TELLING = (
    r"(?:passw(?:or)?d|passphrase|secret|credentials?|api_?key|access_?key|private_?key|"
    r"(?:auth|access|security|session|refresh|bearer|tracking)_?token|signature)"
)
_NAME = re.compile(rf"(?i)(?:^|[_.-]|\b){_TELLING}(?:$|[_.-])|(?:^|_)(?:token|pat)$")
_IN_ADDRESS = re.compile(r"(?P<before>[A-Za-z][\w+.-]*://[^/\s:@'\"]*:)[^/\s@'\"]+(?=@)")
_IN_QUERY = re.compile(
    r"(?P<before>[?&](?:[\w-]*(?:token|secret|signature|password|credential)[\w-]*|sig|key)=)"
    r"[^&\s'\"#]+",
    re.IGNORECASE,
)
_IN_HEADER = re.compile(r"(?P<before>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?P<before>\b[\w.-]*{_TELLING}[\w.-]*['\"]?\s*[=:]\s*['\"]?)[^\s'\",;}}&]+",
    re.IGNORECASE,
)
_PATTERNS = (_IN_ADDRESS, _IN_QUERY, _IN_HEADER, _ASSIGNED)


def redacted(text: str) -> str:
    """The text with every secret in it replaced by `***`."""
    for secret in _secrets_of_the_environment():
        text = text.replace(secret, BLANK)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<before>{BLANK}", text)
    return text


def without_secrets(value: Any) -> Any:
    """JSON-like data with its texts redacted, and texts behind a secret's name blanked."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {
            key: BLANK
            if isinstance(item, str) and item and _NAME.search(str(key))
            else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value


def has_credentials(text: str) -> bool:
    """Whether a text is an address with a password or a signature in it."""
    return bool(_IN_ADDRESS.search(text) or ("://" in text and _IN_QUERY.search(text)))


def secret_variables(prefix: str) -> list[str]:
    """Names of the environment variables with this beginning that hold secrets."""
    return sorted(n for n, v in os.environ.items() if n.startswith(prefix) and v and _is_secret(n))


def _is_secret(name: str) -> bool:
    return bool(_NAME.search(name))


def _secrets_of_the_environment() -> list[str]:
    """The longest first: one may be a part of another."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _MIN_SECRET_CHARACTERS and _is_secret(name)
    }
    # A variable may name the file that holds the secret.
    return sorted((value for value in found if not value.startswith("/")), key=len, reverse=True)
