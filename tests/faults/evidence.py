"""Runs the tests that the promises name, in one pytest, and reads what became of each."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.harness import ROOT
from tests.faults.promises import PROMISES

LIMIT_SECONDS = 1500


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What became of one test, all of its parameters together."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    """Messages."""


def named_tests() -> list[str]:
    """Node ids of all tests that promises name, each once, in the order of their files."""
    return sorted({node for promise in PROMISES for node in nodes_of(promise.tests)})


def nodes_of(tests: dict[str, tuple[str, ...]]) -> list[str]:
    """Node ids of the tests of one promise."""
    return [f"tests/{file}.py::{name}" for file, names in tests.items() for name in names]


def run_tests(nodes: Iterable[str]) -> dict[str, Seen]:
    """Node id → what became of it; a test that was not run is absent."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, f"--junitxml={report}", *nodes],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=LIMIT_SECONDS,
            check=False,
            stdout=subprocess.DEVNULL,
        )
        return _read(report)


def _read(report: Path) -> dict[str, Seen]:
    found: dict[str, list[ET.Element]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by our own pytest
        file = case.get("classname", "").replace(".", "/")
        found.setdefault(f"{file}.py::{case.get('name', '').partition('[')[0]}", []).append(case)
    return {node: _seen(cases) for node, cases in found.items()}


def _seen(cases: list[ET.Element]) -> Seen:
    troubles = [case.find(kind) for case in cases for kind in ("failure", "error")]
    failed = tuple(str(t.get("message"))[:300] for t in troubles if t is not None)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Seen(passed=len(cases) - len(failed) - skipped, skipped=skipped, failed=failed)
