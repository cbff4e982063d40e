"""The table of promises names tests that exist, and says fail where something failed."""

import ast
from dataclasses import replace

import pytest

from tests.faults import mutants
from tests.faults.evidence import Seen, named_tests
from tests.faults.harness import ROOT
from tests.faults.promises import PROMISES
from tests.faults.storm import share
from tests.faults.table import judge

GOOD = {"storm": (True, "s"), "mutants": (True, "m"), "soak": (True, "k")}


def test_every_promise_is_there_once_and_is_proved_or_says_why_not():
    assert [promise.number for promise in PROMISES] == list(range(1, 36))
    assert all(promise.tests or promise.parts or promise.gap for promise in PROMISES)


@pytest.mark.parametrize("node", named_tests())
def test_a_test_that_a_promise_rests_on_exists(node):
    path, name = node.split("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}


def test_a_failed_a_missing_and_a_broken_part_are_told_as_failures():
    seen = {node: Seen(passed=1, skipped=0, failed=()) for node in named_tests()}
    rows = judge(seen, GOOD, with_tests=True)
    assert {row.verdict for row in rows} == {"pass"}
    node = next(node for node in named_tests() if "test_engine_lease" in node)
    broken = judge({**seen, node: replace(seen[node], failed=("no",))}, GOOD, with_tests=True)
    assert [row.number for row in broken if row.verdict == "FAIL"] == [18]
    missing = {key: value for key, value in seen.items() if key != node}
    rows = judge(missing, GOOD, with_tests=True)
    assert [row.number for row in rows if row.verdict == "FAIL"] == [18]
    rows = judge(seen, {**GOOD, "mutants": (False, "died")}, with_tests=True)
    assert [row.number for row in rows if row.verdict == "FAIL"] == [21]


def test_the_interval_model_is_the_known_one_where_failures_are_rare():
    stall, interval, restart, between = 0.5, 140.0, 60.0, 10_080.0
    known = 1 - stall / interval - (interval / 2 + restart) / between
    assert share(stall, interval, restart, between) == pytest.approx(known, abs=1e-4)


def test_two_hundred_mutated_videos_kill_no_trainer_and_keep_to_the_memory_cap():
    report, log = mutants.run_apart(200)
    assert report is not None, log
    assert report.mutants >= 200
    assert report.decoded > 20
    assert sum(report.refused.values()) > 20
    assert report.worker_growth_mib < report.cap_mib
