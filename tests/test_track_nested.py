"""Probe scores in MLflow: one nested run per checkpoint and task, however often it is sent."""

import json
from dataclasses import asdict

import pytest
from mlflow import MlflowClient

from pipeline.track.folder import update_run_info
from pipeline.track.metrics import TrackConfig
from pipeline.track.mlflow_sink import mlflow_run_id, upload_job
from pipeline.track.mlflow_upload import Uploader
from pipeline.track.nested import is_recorded, nested_runs
from tests.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "probed").start().steps(1, 3)
    for step in (0, 60):
        run.probe("linear", step, 0.3 + step / 200).probe("knn", step, 0.2)
    return run


def upload(run):
    uploader = Uploader(upload_job(TrackConfig(), run.path, is_training=False))
    assert uploader.work(at_once=True), (run.path / "mlflow.json").read_text()
    return uploader


def children(run):
    client = MlflowClient(f"sqlite:///{run.path.parent / 'mlflow.db'}")
    parent = mlflow_run_id(run.path)
    wanted = f"tags.`mlflow.parentRunId` = '{parent}'"
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], wanted)
    return {child.data.tags["jepa.probe"]: child for child in found}, client


def test_every_checkpoint_and_task_has_one_nested_run_however_often_it_is_sent(run):
    upload(run)
    upload(run)
    found, client = children(run)
    assert sorted(found) == ["synthetic@0", "synthetic@60"]
    assert found["synthetic@60"].data.metrics["linear/top1"] == pytest.approx(0.6)
    assert found["synthetic@60"].data.metrics["knn/top1"] == pytest.approx(0.2)
    assert found["synthetic@60"].info.status == "FINISHED"
    names = {file.path for file in client.list_artifacts(found["synthetic@0"].info.run_id)}
    assert names == {
        f"synthetic-step00000000-teacher-{head}-seed0.json" for head in ("knn", "linear")
    }
    assert is_recorded(run.path, "synthetic", 60)
    assert not is_recorded(run.path, "synthetic", 30)


def test_a_probe_that_was_done_again_updates_its_nested_run(run):
    upload(run)
    run.probe("linear", 60, 0.75)
    assert not is_recorded(run.path, "synthetic", 60)
    upload(run)
    found, _ = children(run)
    assert len(found) == 2
    assert found["synthetic@60"].data.metrics["linear/top1"] == pytest.approx(0.75)
    assert is_recorded(run.path, "synthetic", 60)


def test_a_nested_run_whose_id_a_crash_lost_is_found_again(run):
    upload(run)
    path = run.path / "mlflow.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "nested": {}}))
    upload(run)
    found, client = children(run)
    assert len(found) == 2
    history = client.get_metric_history(found["synthetic@0"].info.run_id, "linear/top1")
    assert len(history) == 1


def test_scores_are_grouped_by_task_and_step(run, tmp_path):
    update_run_info(run.path, {"run_id": "other"})
    groups = nested_runs(run.path)
    assert [(group.key, len(group.scores)) for group in groups] == [
        ("synthetic@0", 2),
        ("synthetic@60", 2),
    ]
    assert len({group.digest for group in groups}) == 2
    assert all(asdict(score)["task"] == "synthetic" for group in groups for score in group.scores)
