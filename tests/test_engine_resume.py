"""A run goes on as the very same run, at the same number of ranks, another one, or ZeRO stage."""

import pytest

from pipeline.checkpoint.load import find_commit, verify
from tests.ranks import run_on_ranks

WORKER = "tests.workers.resume_run"
# The long one is the default of runs; others share its launch with fewer steps.
CASES = {
    (3, "fp32"): (10, 60),
    (3, "bf16"): (3, 9),
    (2, "bf16"): (2, 5),
    (2, "fp32"): (2, 5),
    (1, "bf16"): (2, 5),
    (1, "fp32"): (2, 5),
    (0, "bf16"): (2, 5),
    (0, "fp32"): (2, 5),
}
# Name, ranks, ZeRO stage and steps to take; three ranks do not divide the global batch.
CHAIN = (("one", 1, 2, 10), ("three", 3, 3, 0), ("two", 2, 3, 10))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    tasks = [
        {"do": "go_on", "stage": stage, "precision": precision, "at": at, "last": last}
        for (stage, precision), (at, last) in CASES.items()
    ]
    reports = run_on_ranks(WORKER, 2, out, {"tasks": tasks})[0]
    return out, dict(zip(CASES, reports, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_end_of_a_resumed_run_are_those_of_one_never_stopped(two_ranks, case):
    _, reports = two_ranks
    report, (at, last) = reports[case], CASES[case]
    assert len(report["without"]) == last - at
    assert report["after"] == report["without"]
    assert len(set(report["without"])) > 1, "the loss must move"
    end, end_again = report["ends"]
    assert end_again == end
    assert any(name.startswith("exp_avg_sq/predictor.") for name in end)
    averaged = {name: end[f"encoder{name[7:]}"] for name in end if name.startswith("teacher.")}
    assert averaged
    assert all(end[name] != student for name, student in averaged.items())


@pytest.fixture(scope="module")
def passed_on(two_ranks, tmp_path_factory):
    """The run of two ranks, handed on to one, to three and back to two, each time as a commit."""
    out, _ = two_ranks
    source, reports, refused = out / "stage-3-fp32", {}, {}
    for name, ranks, stage, steps in CHAIN:
        place = tmp_path_factory.mktemp(name)
        tasks = [{"do": "pass_on", "source": str(source), "stage": stage, "steps": steps}]
        if name == "one":
            tasks.append({"do": "refuse", "source": str(source)})
        told = run_on_ranks(WORKER, ranks, place, {"tasks": tasks})
        reports[name] = [report[0] for report in told]
        refused |= told[0][1] if name == "one" else {}
        source = place / "passed-on"
    return reports, refused


def test_two_one_three_and_two_ranks_hold_the_same_bits(two_ranks, passed_on):
    out, _ = two_ranks
    saved = find_commit(out / "stage-3-fp32").manifest.fingerprints
    assert len(saved) > 100
    for name, ranks in passed_on[0].items():
        assert ranks[0]["before"] != saved, "a fresh engine holds something else"
        assert ranks[0]["fingerprints"] == saved, name


def test_a_change_of_ranks_is_told_in_one_line(passed_on):
    assert passed_on[0]["one"][0]["said"].startswith(
        "saved with 2, running 1: resharded, fingerprints equal"
    )


def test_losses_after_a_change_of_ranks_are_those_of_the_run_within_rounding(two_ranks, passed_on):
    _, reports = two_ranks
    whole = [float.fromhex(loss) for loss in reports[3, "fp32"]["without"]]
    for name in ("one", "two"):
        losses = passed_on[0][name][0]["losses"]
        assert len(losses) == 10
        assert losses == pytest.approx(whole[:10], rel=1e-6), name


def test_random_generators_start_anew_after_a_change_of_ranks_each_rank_its_own(passed_on):
    one, three = ([rank["draw"] for rank in passed_on[0][name]] for name in ("one", "three"))
    assert len(set(three)) == 3
    assert one[0] == three[0], "they depend on seed, step and rank alone"


def test_the_original_commit_is_never_altered(two_ranks, passed_on):
    out, _ = two_ranks
    assert passed_on
    assert verify(find_commit(out / "stage-3-fp32").commit.path) == []


def test_what_did_not_arrive_is_refused_by_the_name_of_the_tensor(passed_on):
    said = passed_on[1]
    assert f"not what was saved, 1 in all: {said['name']}." in said["wrong"]
    assert "jepa resume RUN --step N" in said["wrong"]
    assert said["before"] == "[]"
    assert said["stale"] == "['encoder.blocks.0.norm1.weight']"


def test_other_networks_are_refused_and_another_schedule_is_told(passed_on):
    said = passed_on[1]
    assert "lacks" in said["other"]
    assert "predictor_blocks.1." in said["other"]
    assert "weight decay of step 10 was" in said["changes"]
    assert "learning rate of step 10 was" in said["changes"]
