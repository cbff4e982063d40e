"""Records, rates and tracking configuration."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.clip import StepReport
from pipeline.errors import StorageError
from pipeline.track.jsonl import JsonLinesWriter, read_json_lines
from pipeline.track.metrics import (
    LoggedStep,
    MlflowConfig,
    StageCost,
    read_all_metrics,
    read_events,
    read_metrics,
)
from pipeline.track.rates import eta_seconds, wait_share, window_rates

REPORT = StepReport(
    step=1,
    stage=0,
    stage_name="short",
    loss=0.5,
    terms={"loss_mask_0": 0.5},
    learning_rate=1e-3,
    weight_decay=0.04,
    momentum=0.99,
    gradient_norm=1.0,
    step_seconds=2.0,
    data_wait_seconds=0.1,
    clips=8,
    tokens=512,
    flops=1e12,
    peak_memory_gib=1.0,
    num_faults=0,
)


def write_steps(run_dir, numbers, *, loss=0.5, start=100.0):
    writer = JsonLinesWriter(run_dir / "metrics.jsonl")
    for number in numbers:
        writer.write({"time": start + number, **asdict(replace(REPORT, step=number, loss=loss))})
    writer.close()


@given(loss=st.floats(allow_nan=False, allow_infinity=False), norm=st.floats(0, 1e30))
@settings(max_examples=50, deadline=None)
def test_a_report_comes_back_from_its_line_bit_for_bit(tmp_path_factory, loss, norm):
    run_dir = tmp_path_factory.mktemp("run")
    report = replace(REPORT, loss=loss, gradient_norm=norm, health={"feature_std": 0.1 + 0.2})
    writer = JsonLinesWriter(run_dir / "metrics.jsonl")
    writer.write({"time": 1.5, **asdict(report)})
    writer.close()
    assert read_metrics(run_dir) == (LoggedStep(time=1.5, report=report),)


def test_lines_are_strict_json_even_when_the_loss_is_not_finite(tmp_path):
    write_steps(tmp_path, [1], loss=math.inf)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] is None
    assert math.isnan(read_metrics(tmp_path)[0].report.loss)


def test_a_torn_last_line_is_no_step_and_the_next_writer_cuts_it_off(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 103.0, "step": 3, "lo')
    assert [step.report.step for step in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3])
    assert [step.report.step for step in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_json_lines(tmp_path / "metrics.jsonl").num_unreadable == 0


def test_every_cut_of_the_file_reads_as_the_whole_lines_before_it(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    for cut in range(0, len(content) + 1, 7):
        path.write_bytes(content[:cut])
        assert len(read_metrics(tmp_path)) == content[:cut].count(b"\n")


def test_a_resume_supersedes_all_later_steps_even_those_not_taken_again_yet(tmp_path):
    write_steps(tmp_path, range(1, 21), loss=1.0)
    write_steps(tmp_path, range(11, 14), loss=2.0)
    kept = read_metrics(tmp_path)
    assert [step.report.step for step in kept] == list(range(1, 14))
    assert [step.report.loss for step in kept] == [1.0] * 10 + [2.0] * 3
    assert len(read_all_metrics(tmp_path)) == 23


def test_reading_on_from_an_earlier_end_gives_the_new_lines_only(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first = read_json_lines(path)
    write_steps(tmp_path, [3])
    second = read_json_lines(path, first.end)
    assert [record["step"] for record in second.records] == [3]
    assert second.end == path.stat().st_size


def test_a_key_of_a_newer_version_does_not_hide_the_step(tmp_path):
    line = {"time": 1.0, **asdict(REPORT), "brand_new": 7}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n[]\nnot json\n")
    assert read_metrics(tmp_path) == (LoggedStep(time=1.0, report=REPORT),)
    assert read_json_lines(tmp_path / "metrics.jsonl").num_unreadable == 2


def test_events_keep_their_own_fields(tmp_path):
    line = '{"time": 5.0, "event": "save", "step": 10, "seconds": 1.5}\n{"no": "event"}\n'
    (tmp_path / "events.jsonl").write_text(line)
    (event,) = read_events(tmp_path)
    assert (event.name, event.step, event.details) == ("save", 10, {"seconds": 1.5})


def test_a_full_disk_is_a_storage_error():
    writer = JsonLinesWriter(Path("/dev/full"))
    with pytest.raises(StorageError, match="/dev/full"):
        writer.write({"step": 1})
    writer.close()


def test_rates_are_those_of_the_current_stage_without_its_first_step():
    slow = [replace(REPORT, step=n, step_seconds=9.0) for n in range(1, 5)]
    first = replace(REPORT, step=5, stage=1, step_seconds=60.0)
    later = [replace(REPORT, step=n, stage=1, step_seconds=0.5) for n in range(6, 9)]
    rates = window_rates([*slow, first, *later], peak_tflops=10.0, world_size=2)
    assert rates is not None
    assert rates.step_seconds == 0.5
    assert rates.clips_per_second == 16.0
    assert rates.tokens_per_second == 1024.0
    # 1e12 FLOPs in 0.5 s on two GPUs of 10 TFLOP/s each.
    assert rates.mfu == pytest.approx(0.1)


def test_without_a_stated_peak_there_is_no_utilisation_and_without_steps_no_rate():
    rates = window_rates([REPORT])
    assert rates is not None
    assert rates.mfu is None
    assert window_rates([]) is None


def test_one_long_stall_among_many_steps_shows_in_the_wait_share():
    reports = [replace(REPORT, step_seconds=1.0, data_wait_seconds=0.0) for _ in range(19)]
    reports.append(replace(REPORT, step_seconds=21.0, data_wait_seconds=20.0))
    assert wait_share(reports) == pytest.approx(0.5)


PLAN = (
    StageCost(name="short", steps=10, flops_per_step=1.0),
    StageCost(name="long", steps=5, flops_per_step=4.0),
)


def logged(numbers, *, seconds, stage=0, gap=0.0, start=0.0):
    return [
        LoggedStep(
            time=start + (seconds + gap) * count,
            report=replace(REPORT, step=number, stage=stage, step_seconds=seconds),
        )
        for count, number in enumerate(numbers)
    ]


def test_time_left_scales_a_stage_not_reached_yet_by_its_cost():
    # 4 steps of 2 s remain here, then 5 steps at four times the cost.
    assert eta_seconds(logged(range(1, 7), seconds=2.0), PLAN) == pytest.approx(4 * 2 + 5 * 8)


def test_time_left_uses_what_a_stage_was_measured_to_take():
    steps = [*logged(range(1, 11), seconds=2.0), *logged([11, 12], seconds=3.0, stage=1, start=20)]
    assert eta_seconds(steps, PLAN) == pytest.approx(3 * 3.0, rel=0.1)


def test_time_left_counts_what_lies_between_steps():
    steps = logged(range(1, 7), seconds=2.0, gap=1.0)
    assert eta_seconds(steps, PLAN) == pytest.approx(1.5 * (4 * 2 + 5 * 8))


def test_time_left_is_zero_at_the_end_and_unknown_before_the_start():
    assert eta_seconds(logged([14, 15], seconds=3.0, stage=1), PLAN) == 0.0
    assert eta_seconds([], PLAN) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tracking_uri": "file:///runs"}, "no longer keeps runs in plain folders"),
        ({"tracking_uri": "runs/mlruns"}, "expected sqlite:///FILE"),
        ({"tracking_uri": "https://me:secret@host"}, "MLFLOW_TRACKING_TOKEN"),
        ({"tracking_uri": "http://mlflow.lab:5000"}, "track.mlflow.allow_plain_http: true"),
    ],
)
def test_an_unsafe_or_unusable_address_is_refused_with_what_to_do(values, words):
    with pytest.raises(ValidationError, match=words):
        MlflowConfig(**values)


def test_the_password_of_a_refused_address_is_not_repeated():
    with pytest.raises(ValidationError) as caught:
        MlflowConfig(tracking_uri="https://me:secret@host")
    assert "secret" not in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:5000", "https://mlflow.lab", "sqlite:////scratch/mlflow.db", None]
)
def test_safe_addresses_are_taken(uri):
    assert MlflowConfig(tracking_uri=uri).tracking_uri == uri


def test_plain_http_is_taken_where_it_is_allowed():
    config = MlflowConfig(tracking_uri="http://mlflow.lab:5000", allow_plain_http=True)
    assert config.tracking_uri == "http://mlflow.lab:5000"
