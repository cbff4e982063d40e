"""Prometheus reads what metrics.jsonl has, no scrape holds up a step, and the board asks for it."""

import json
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.clip import StepReport
from pipeline.environment import free_port
from pipeline.track.metrics import (
    MlflowConfig,
    PrometheusConfig,
    StageCost,
    TrackConfig,
    read_metrics,
)
from pipeline.track.prometheus import PrometheusEndpoint
from pipeline.track.sinks import Tracker
from tests.running import finish, jepa, long_stage, wait_for_step, wait_until, write_config
from tests.shards import write_dataset

BOARD = Path(__file__).parents[1] / "k8s" / "grafana" / "jepa-runs.json"


def report(step: int, **changes) -> StepReport:
    values = {
        "step": step, "stage": 1, "stage_name": "long", "loss": 0.5, "terms": {"mask0": 0.25},
        "learning_rate": 1e-3, "weight_decay": 0.04, "momentum": 0.99, "gradient_norm": 2.0,
        "step_seconds": 2.0, "data_wait_seconds": 0.5, "clips": 8, "tokens": 1000, "flops": 1e9,
        "peak_memory_gib": 1.5, "num_faults": 1, **changes,
    }  # fmt: skip
    return StepReport(**values)


def tracker(folder: Path, port: int, *, is_main: bool = True) -> Tracker:
    config = TrackConfig(
        mlflow=MlflowConfig(enabled=False), prometheus=PrometheusConfig(enabled=True, port=port)
    )
    plan = [StageCost(name="long", steps=100, flops_per_step=1.0)]
    made = Tracker(config, plan=plan, is_main=is_main)
    made.start(folder, "name: x\n", resume=False)
    return made


def scrape(port: int) -> dict[str, dict[tuple, float]]:
    """Values by the sample's name and its labels besides the run's."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(v for name, v in sorted(sample.labels.items()) if name != "run")
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def serves(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def served(tmp_path):
    port = free_port()
    made = tracker(tmp_path, port)
    wait_until(lambda: serves(port), "the endpoint listens", 60)
    yield made, port
    made.close("finished")


def test_a_scrape_tells_the_newest_step_checkpoint_and_counts(served):
    made, port = served
    assert "jepa_step" not in scrape(port)
    # A run that was taken up and never saves must raise the same alarm as any other.
    made.event("resume", step=2, world_size=1)
    assert scrape(port)["jepa_checkpoint_step"] == {(): 2.0}
    made.event("save", step=4, seconds=0.1)
    made.event("skip", step=5, reason="nan")
    for step in (5, 6):
        made.log(report(step, loss=step / 10, health={"effective_rank": 12.0}))
    seen = scrape(port)
    assert seen["jepa_step"] == {(): 6.0}
    assert seen["jepa_loss"] == {(): 0.6}
    assert seen["jepa_loss_term"] == {("mask0",): 0.25}
    assert seen["jepa_stage"] == {("long",): 1.0}
    assert seen["jepa_tokens_per_second"] == {(): 500.0}
    assert seen["jepa_data_wait_share"] == {(): 0.25}
    assert seen["jepa_steps_planned"] == {(): 100.0}
    assert seen["jepa_checkpoint_step"] == {(): 4.0}
    assert 0 <= seen["jepa_checkpoint_age_seconds"][()] < 60
    assert seen["jepa_bad_samples_total"] == {(): 2.0}
    assert seen["jepa_skipped_steps_total"] == {(): 1.0}
    assert seen["jepa_health"] == {("effective_rank",): 12.0}
    assert seen["jepa_health_state"] == {(): 1.0}


def test_scrapes_that_never_end_hold_up_no_step(served):
    made, port = served
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for connection in held:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
    begin = time.monotonic()
    for step in range(1, 51):
        made.log(report(step))
    assert time.monotonic() - begin < 30
    assert scrape(port)["jepa_step"] == {(): 50.0}
    for connection in held:
        connection.close()


def test_it_listens_on_the_loopback_alone_and_ends_with_the_run(tmp_path):
    port = free_port()
    made = tracker(tmp_path, port)
    wait_until(lambda: serves(port), "the endpoint listens", 60)
    listening = Path("/proc/net/tcp").read_text()
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening
    made.close("finished")
    wait_until(lambda: not serves(port), "the endpoint ends", 60)


def test_other_ranks_and_unasked_runs_do_not_listen(tmp_path):
    port = free_port()
    tracker(tmp_path, port, is_main=False).log(report(1))
    time.sleep(0.5)
    assert not serves(port)
    assert TrackConfig().prometheus.enabled is False
    assert PrometheusConfig().host == "127.0.0.1"


def test_a_taken_port_costs_the_run_nothing_but_a_word(tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        made = tracker(tmp_path, other.getsockname()[1])

        def told() -> bool:
            made.log(report(int(time.monotonic() * 1000)))
            return "cannot listen" in capsys.readouterr().out

        wait_until(told, "the taken port is told", 60)
        made.close("finished")


def test_every_query_of_the_board_names_a_metric_that_there_is(tmp_path):
    endpoint = PrometheusEndpoint(PrometheusConfig(), run="x", num_steps=10)
    endpoint.event("save", {"step": 1})
    endpoint.log(report(2, health={"effective_rank": 3.0}))
    figures = list(endpoint.figures())
    known = {f"jepa_{one.name}{'_total' if one.is_counter else ''}" for one in figures}
    board = json.loads(BOARD.read_text())
    queries = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    queries += [one["query"]["query"] for one in board["templating"]["list"][1:]]
    asked = {name for query in queries for name in re.findall(r"jepa_\w+", query)}
    assert asked <= known
    # And nothing that a run tells is left out of it.
    assert known - asked == set()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for query in queries[:-1]:
        assert query.count("(") == query.count(")")
        assert '{run=~"$run"}' in query


def test_a_real_run_is_read_while_it_trains(tmp_path):
    write_dataset(tmp_path / "data", 8)
    port = free_port()
    track = {
        "mlflow": {"enabled": False},
        "health_every_steps": 1,
        "prometheus": {"enabled": True, "port": port},
    }
    config = write_config(tmp_path, "watched", stages=long_stage(), track=track)
    run = tmp_path / "watched"
    process = jepa("train", config)
    try:
        wait_for_step(run, 4)
        seen = scrape(port)
        by_step = {step.report.step: step.report for step in read_metrics(run)}
        assert seen["jepa_loss"][()] == pytest.approx(by_step[int(seen["jepa_step"][()])].loss)
        assert seen["jepa_steps_planned"] == {(): 100_000.0}
        assert ("effective_rank",) in seen["jepa_health"]
        wait_until(lambda: "jepa_checkpoint_step" in scrape(port), "a checkpoint is told", 60)
    finally:
        process.terminate()
        finish(process)
    with pytest.raises(urllib.error.URLError):
        scrape(port)
