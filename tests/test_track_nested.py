"""Probe scores in MLflow: one nested run per checkpoint and task, however often it is sent."""

import json
from dataclasses import dataclass, field

import pytest
from mlflow import MlflowClient

from pipeline.track.metrics import TrackConfig
from pipeline.track.mlflow_sink import mlflow_run_id, upload_job
from pipeline.track.mlflow_upload import Uploader
from pipeline.track.nested import is_recorded, nested_runs
from tests.run_folder import RunFolder


@dataclass
class Seen:
    """MLflow after a part of the story: metrics and files of every nested run, by its key."""

    metrics: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    recorded: dict = field(default_factory=dict)
    num_points: int = 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = RunFolder(tmp_path_factory.mktemp("runs") / "probed").start().steps(1, 3)
    for step in (0, 60):
        run.probe("linear", step, 0.3 + step / 200).probe("knn", step, 0.2)
    return run


@pytest.fixture(scope="module")
def story(run):
    """Sent twice; probed again and sent; sent once more after a crash lost the ids."""
    upload(run)
    upload(run)
    twice = look(run)
    run.probe("linear", 60, 0.75)
    unsent = look(run)
    upload(run)
    again = look(run)
    path = run.path / "mlflow.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "nested": {}}))
    upload(run)
    return twice, unsent, again, look(run)


def upload(run):
    uploader = Uploader(upload_job(TrackConfig(), run.path, is_training=False))
    assert uploader.work(at_once=True), (run.path / "mlflow.json").read_text()


def look(run):
    client = MlflowClient(f"sqlite:///{run.path.parent / 'mlflow.db'}")
    parent = client.get_run(mlflow_run_id(run.path)).info
    found = client.search_runs(
        [parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    seen = Seen(recorded={step: is_recorded(run.path, "synthetic", step) for step in (0, 30, 60)})
    for child in found:
        key = child.data.tags["jepa.probe"]
        assert child.info.status == "FINISHED"
        assert key not in seen.metrics, "recorded twice"
        seen.metrics[key] = child.data.metrics
        seen.files[key] = {file.path for file in client.list_artifacts(child.info.run_id)}
        seen.num_points += len(client.get_metric_history(child.info.run_id, "linear/top1"))
    return seen


def test_every_checkpoint_and_task_has_one_nested_run_however_often_it_is_sent(story):
    twice = story[0]
    assert sorted(twice.metrics) == ["synthetic@0", "synthetic@60"]
    assert twice.metrics["synthetic@60"]["linear/top1"] == pytest.approx(0.6)
    assert twice.metrics["synthetic@60"]["knn/top1"] == pytest.approx(0.2)
    heads = ("knn", "linear")
    wanted = {f"synthetic-step00000000-teacher-{head}-seed0.json" for head in heads}
    assert twice.files["synthetic@0"] == wanted
    assert twice.recorded == {0: True, 30: False, 60: True}


def test_a_probe_that_was_done_again_updates_its_nested_run(story):
    _, unsent, again, _ = story
    assert unsent.recorded == {0: True, 30: False, 60: False}
    assert len(again.metrics) == 2
    assert again.metrics["synthetic@60"]["linear/top1"] == pytest.approx(0.75)
    assert again.recorded == {0: True, 30: False, 60: True}


def test_a_nested_run_whose_id_a_crash_lost_is_found_again(story):
    *_, again, last = story
    assert (last.metrics, last.num_points) == (again.metrics, again.num_points)
    assert last.recorded == again.recorded


def test_scores_are_grouped_by_task_and_step(run):
    groups = nested_runs(run.path)
    assert [(group.key, len(group.scores)) for group in groups] == [
        ("synthetic@0", 2),
        ("synthetic@60", 2),
    ]
    assert len({group.digest for group in groups}) == 2
