"""The promises of `promises.toml`."""

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """One row of the table."""

    number: int
    fault: str
    kept: str
    """What is promised to be kept or told."""
    tests: dict[str, tuple[str, ...]]
    """Test files below `tests/` and the names of their tests."""
    parts: tuple[str, ...]
    """Parts of the long run: `storm`, `mutants`, `soak`."""
    gap: str
    """What of it is not covered, and why."""


def _read() -> tuple[Promise, ...]:
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return tuple(
        Promise(
            number=row["number"],
            fault=row["fault"],
            kept=row["kept"],
            tests={file: tuple(names) for file, names in row.get("tests", {}).items()},
            parts=tuple(row.get("parts", ())),
            gap=row.get("gap", ""),
        )
        for row in tomllib.loads(text)["promise"]
    )


PROMISES = _read()
