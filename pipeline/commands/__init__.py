"""The verbs of `jepa`, one thin function each; `pipeline.cli` names them as text.

A verb returns an `ExitCode`, an integer or nothing, raises errors of `pipeline.errors`,
and prints its result with `print_text` or `print_json`.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from cyclopts import Parameter

JsonFlag: TypeAlias = Annotated[bool, Parameter(name="--json", negative="")]
"""`--json`: standard output holds one JSON document, the result or `{"error": …}`."""

ConfigPath: TypeAlias = Annotated[Path, Parameter(help="YAML file of the run.")]
"""The CONFIG argument of many verbs."""

Overrides: TypeAlias = Annotated[str, Parameter(help="key=value over the file, e.g. seed=7.")]
"""The type of `*overrides`; list items by position, as in `stages.0.steps=100`."""


def print_text(text: str) -> None:
    """A result for people; ends with one line break."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def print_json(result: Any) -> None:
    """A result for programs, as one JSON document."""
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
