"""A YAML file and `key=value` overrides to a frozen configuration, or all that is wrong with them.

The data goes to pydantic as JSON: in strict mode that is where a list is a tuple and a text is a
path or an enumeration, while `"3"` is still no integer and `1` no boolean.
"""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from pipeline.config.credentials import credentials_in
from pipeline.config.emit import yaml_lines
from pipeline.config.mistakes import mistakes_of, shown
from pipeline.config.overrides import apply_overrides
from pipeline.config.parse import parse_tree
from pipeline.config.section import Section
from pipeline.config.tree import Mistake, Node, Origin, branch, origins_of, plain
from pipeline.errors import ConfigError, StorageError, UsageError

S = TypeVar("S", bound=Section)

# The longest shipped configuration has a few KiB; whatever is larger is another kind of file.
MAX_BYTES = 256 * 1024
MAX_MISTAKES_SHOWN = 100
SHIPPED_CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[S]):
    """A configuration and where each of its written keys (`stages.0.steps`) was written.

    Keys that are not in `origins` have their default.
    """

    config: S
    origins: dict[str, Origin]


def load_config(path: Path, schema: type[S], overrides: Sequence[str] = ()) -> Loaded[S]:
    """Read and check a configuration.

    Args:
        path: A YAML file. Relative paths inside it are relative to the current folder.
        schema: The section the whole file is.
        overrides: `key.sub=value`, values in YAML, list items by position; the last one wins.

    Raises:
        UsageError: There is no such file.
        StorageError: The file cannot be read.
        ConfigError: Anything in the file or the overrides is wrong; the message lists all of it.
    """
    text = _read(path, schema)
    parsed = parse_tree(text, lambda line: Origin(file=str(path), line=line))
    mistakes = list(parsed.mistakes)
    root = parsed.root or branch({}, Origin(file=str(path), line=1))
    if root.value is None:  # an empty file: everything has its default
        root = branch({}, root.origin)
    is_readable = parsed.root is not None and isinstance(root.value, dict)
    if not isinstance(root.value, dict):
        problem = f"expected keys and values (key: value), got {shown(plain(root))}"
        mistakes.append(Mistake(origin=root.origin, key="", problem=problem))
        root = branch({}, root.origin)
    root, wrong_overrides = apply_overrides(root, overrides, schema)
    config, invalid = _validated(root, schema)
    # Without a readable file every key would be reported as missing.
    mistakes += wrong_overrides + (invalid if is_readable else [])
    mistakes += credentials_in(root)
    if config is None or mistakes:
        remedy = f"Correct the configuration; {schema.keys_are_in}."
        raise ConfigError(_message(path, mistakes), remedy=remedy)
    origins = {key: origin for key, origin in origins_of(root).items() if origin != Origin()}
    return Loaded(config=config, origins=origins)


def resolved_yaml(config: Section) -> str:
    """Every field, defaults included, as YAML that loads back to an equal configuration."""
    return "".join(f"{line.text}\n" for line in yaml_lines(resolved_data(config)))


def resolved_data(config: Section) -> dict[str, object]:
    """Every field as plain data: what `resolved_yaml` writes down."""
    return config.model_dump(mode="json", round_trip=True)


def _validated(root: Node, schema: type[S]) -> tuple[S | None, list[Mistake]]:
    try:
        return schema.model_validate_json(json.dumps(plain(root))), []
    except ValidationError as error:
        return None, mistakes_of(error, root, schema)
    except ConfigError as error:  # from a section's own check across several keys
        return None, [Mistake(origin=root.origin, key="", problem=str(error))]


def _message(path: Path, mistakes: Sequence[Mistake]) -> str:
    ordered = sorted(mistakes, key=lambda mistake: mistake.origin.line or math.inf)
    lines = [f"  {mistake}" for mistake in ordered[:MAX_MISTAKES_SHOWN]]
    if len(ordered) > MAX_MISTAKES_SHOWN:
        lines.append(f"  … and {len(ordered) - MAX_MISTAKES_SHOWN} more")
    count = "1 mistake" if len(ordered) == 1 else f"{len(ordered)} mistakes"
    return "\n".join([f"{count} in the configuration {path}:", *lines])


def _read(path: Path, schema: type[Section]) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"expected a configuration file, got no file at {path}"
            f"{_near(path, has_shipped=schema.has_shipped_files)}"
        ) from None
    except IsADirectoryError:
        raise UsageError(
            f"expected a configuration file, got the folder {path}{_inside(path)}"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"expected at most {MAX_BYTES // 1024} KiB of YAML, got more in {path}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: expected UTF-8 text, got byte {data[error.start]:#x}"
        ) from None


def _near(path: Path, *, has_shipped: bool) -> str:
    """Existing files with the most similar names: beside the wrong path, then shipped ones."""
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist"
    beside = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    shipped = {file.name: file for file in sorted(SHIPPED_CONFIGS.glob("*.yaml")) if has_shipped}
    found = [
        str(names[name])
        for names in (beside, shipped)
        for name in difflib.get_close_matches(path.name, list(names), n=3, cutoff=0.6)
    ]
    return f"; did you mean {' or '.join(dict.fromkeys(found))}?" if found else ""


def _inside(folder: Path) -> str:
    found = [str(file) for file in sorted(folder.glob("*.yaml"))[:3]]
    return f"; did you mean {' or '.join(found)}?" if found else ""
