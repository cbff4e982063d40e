"""Objects of Kubernetes as text and names: nothing that a user wrote can be more than a value.

Three readers come after us. YAML 1.1 takes `on` and `1_000` for something else than text, so every
text that is not plainly a word is quoted. The kubelet replaces `$(NAME)` in commands and variables,
so `$` is doubled there. And names have an alphabet and a length.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from pipeline.errors import UsageError

Object = dict[str, Any]
# A pod's name holds the job's, its part, two numbers and five letters, and has at most 63 in all.
_NAME_CHARACTERS = 40
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_MEANT_OTHERWISE = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def object_name(name: str, *parts: str) -> str:
    """A name that every object and pod can have; the same for the same job, and for no other."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"r-{plain}".rstrip("-")
    if plain != name or len(plain) > _NAME_CHARACTERS:
        # Two runs whose names differ in what is lost here are two jobs.
        digest = hashlib.sha256(name.encode()).hexdigest()[:6]
        plain = f"{plain[: _NAME_CHARACTERS - 7].rstrip('-')}-{digest}"
    return "-".join([plain, *parts])


def kept(text: str) -> str:
    """A word of a command, or a variable's value, that the kubelet hands on as it is."""
    return text.replace("$", "$$")


def variables(values: Mapping[str, str]) -> list[Object]:
    """Environment variables of a container, by name."""
    return [{"name": name, "value": kept(value)} for name, value in sorted(values.items())]


def to_yaml(objects: Sequence[Object]) -> str:
    """YAML of several objects that old and new readers read alike.

    Raises:
        UsageError: A text holds bytes that are no characters.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 10_000
    yaml.Representer = _Representer
    stream = io.StringIO()
    yaml.dump_all(objects, stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    """Quotes what might be read as something else, and keeps lines of a file as lines."""

    def represent_text(self, data: str) -> ScalarNode:
        if any("\ud800" <= character <= "\udfff" for character in data):
            raise UsageError(
                f"a file name or value is no text, it has bytes that are not UTF-8: {data!r}",
                remedy="Rename the file, or give the value without those bytes.",
            )
        style = "|" if _is_block(data) else None
        if style is None and (not _PLAIN.fullmatch(data) or data.lower() in _MEANT_OTHERWISE):
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
        return True


_Representer.add_representer(str, _Representer.represent_text)


def _is_block(text: str) -> bool:
    """Whether it is a file that a literal block gives back to the last character."""
    lines = text.split("\n")
    if len(lines) < 3 or lines[-1] or not lines[-2] or not lines[0] or lines[0][0] == " ":
        return False
    return all(
        line.isascii() and (line.isprintable() or not line) and line == line.rstrip()
        for line in lines
    )
