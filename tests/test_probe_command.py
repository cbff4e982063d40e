"""`jepa probe`: the same numbers through Ray and in the process, and errors that help."""

import importlib.util
import json
import os
from dataclasses import replace

import pytest
import torch

from pipeline import cluster
from pipeline.cli import main
from pipeline.conduct.tasks import TaskNeeds, run_as_task
from pipeline.errors import DataError, ExitCode, PeerLostError
from pipeline.probe.evaluate import run_probe
from pipeline.probe.records import ProbeProgress, ProbeRequest
from pipeline.probe.tasks import KnnConfig
from pipeline.track.folder import read_probes
from tests.probe_data import ssv2_task, write_run, write_ssv2

NEEDS = TaskNeeds(num_cpus=1, num_gpus=0, describe="a test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    write_ssv2(folder / "set", train=9, validation=6)
    write_run(folder, (0, 20))
    (folder / "task.yaml").write_text(
        f"""
name: squares
data: {{kind: ssv2, videos: {folder}/set/videos, annotations: {folder}/set/labels}}
clip: {{frames: 4, fps: 4.0, resolution: 32, views: 1}}
attentive: {{blocks: 1, attention_heads: 2, epochs: 2, batch: 4}}
linear: {{learning_rates: [0.01], epochs: 3}}
"""
    )
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a task of one CPU has
    yield
    torch.set_num_threads(before)


def test_steps_are_compared_in_one_table_with_difference_and_chance(folder, capsys):
    assert _probe(folder, "--steps", "0,last", "--seeds", "2") == 0
    printed = capsys.readouterr().out
    for part in ("step 0 (untrained)", "step 20", "difference", "33.3%", "attentive", "linear"):
        assert part in printed
    told = " ".join(printed.split())
    assert "± behind a score: standard deviation over its seeds." in told
    assert "± behind a difference: 95 % interval" in told
    assert "In brackets: 95 % interval" in told, "k-NN has no seeds"


def test_json_holds_the_records_that_stand_in_the_runs_folder(folder, capsys):
    assert _probe(folder, "--head", "knn") == 0
    capsys.readouterr()
    assert _probe(folder, "--head", "linear", "--seeds", "2", "--json") == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert [(record["step"], record["seed"]) for record in records] == [(20, 0), (20, 1)]
    told = json.loads((folder / "run/probes/squares-step00000020-teacher.json").read_text())
    linear = [{**told, **score} for score in told["scores"] if score["head"] == "linear"]
    for record, found in zip(records, linear, strict=True):
        same = record.keys() - {"written"}
        assert {key: found[key] for key in same} == {key: record[key] for key in same}
    # The head probed before stands beside them: encoder, task and settings are the same.
    assert {"knn", "linear"} <= {score["head"] for score in told["scores"]}
    (shown, _) = [s for s in read_probes(folder / "run") if (s.head, s.step) == ("linear", 20)]
    assert (shown.task, shown.trained, shown.num_val) == ("squares", True, 6)


def test_one_checkpoint_and_the_student_can_be_named(folder, capsys):
    commit = str(folder / "run" / "checkpoints" / "step-00000000")
    words = ["probe", commit, "--task", str(folder / "task.yaml"), "--no-ray", "--head", "knn"]
    assert main([*words, "--which", "student", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert (record["which"], record["step"]) == ("student", 0)


def test_a_fitted_head_is_exported_and_scores_the_same_when_it_is_given_back(
    folder, tmp_path, capsys
):
    out = tmp_path / "classifier"
    words = ("--head", "attentive", "--json", "--out", str(tmp_path / "fitted"))
    assert _probe(folder, *words, "--export-head", str(out)) == 0
    printed = capsys.readouterr()
    (fitted,) = json.loads(printed.out)["records"]
    assert "largest difference of logits" in printed.err
    assert (
        json.loads((out / "config.json").read_text())["id2label"]["0"] == fitted["class_names"][0]
    )
    head = (
        tmp_path / "fitted" / "heads" / "squares-step00000020-teacher-attentive-seed0.safetensors"
    )
    for given in (head, out):
        assert _probe(folder, "--given-head", str(given), "--json") == 0
        (scored,) = json.loads(capsys.readouterr().out)["records"]
        assert scored["confusion"] == fitted["confusion"]
        assert (scored["head"], scored["rules"][0]["rule"]) == ("given", "fixed")
    assert _probe(folder, "--head", "knn", "--given-head", str(head)) == ExitCode.USAGE
    assert _probe(folder, "--workers", "2") == ExitCode.USAGE
    assert "--workers needs Ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["{f}/rum", "--task", "{f}/task.yaml"], ExitCode.USAGE, "did you mean run?"),
        (["{f}", "--task", "{f}/task.yaml"], ExitCode.USAGE, "there are runs in it: run"),
        (["{f}/run", "--task", "{f}/tusk.yaml"], ExitCode.USAGE, "did you mean task.yaml"),
        (["{f}/run", "--task", "{f}/task.yaml", "--step", "7"], ExitCode.CONFIG, "are: 0, 20"),
        (["{f}/run", "--task", "{f}/task.yaml", "--steps", "0;7"], ExitCode.USAGE, "commas"),
        (["{f}/run", "--task", "{f}/task.yaml", "--seeds", "0"], ExitCode.USAGE, "at least 1"),
        (["{f}/run", "clip.frame=3", "--task", "{f}/task.yaml"], ExitCode.CONFIG, "'frame_step'"),
        (["{f}/run", "clip.resolution=30", "--task", "{f}/task.yaml"], ExitCode.CONFIG, "24 or 32"),
        (["{f}/run", "data.videos=no", "--task", "{f}/task.yaml"], ExitCode.CONFIG, "data.videos"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_with_what_was_expected(folder, capsys, words, code, said):
    assert main(["probe", *(word.format(f=folder) for word in words), "--no-ray"]) == code
    assert said in capsys.readouterr().err


def test_a_run_without_checkpoints_and_a_damaged_one_are_refused(folder, tmp_path, capsys):
    run_dir = write_run(tmp_path, (3,))
    weights = run_dir / "checkpoints" / "step-00000003" / "weights-rank00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    words = ["probe", str(run_dir), "--task", str(folder / "task.yaml"), "--no-ray"]
    assert main(words) == ExitCode.CONFIG
    assert "its content was changed" in capsys.readouterr().err
    (weights.parent / "manifest.json").unlink()
    assert main(words) == ExitCode.CONFIG
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_without_ray_the_probe_runs_in_this_process_and_says_so(folder, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "ray" else found(name, *rest),
    )
    monkeypatch.setattr(cluster, "_import_ray", lambda **_: pytest.fail("Ray was started"))
    words = ["probe", str(folder / "run"), "--task", str(folder / "task.yaml"), "--head", "knn"]
    assert main(words) == 0
    assert "Ray is not installed" in capsys.readouterr().err


def test_ray_gives_the_same_numbers_its_progress_and_the_errors_as_they_were_raised(folder):
    request = _request(folder, "through-ray")
    with cluster.local_ray(num_cpus=1):
        events: list[ProbeProgress] = []
        through_ray = run_as_task(run_probe, request, needs=NEEDS, report=events.append)
        with pytest.raises(DataError, match="five videos are gone") as raised:
            run_as_task(_fails, needs=NEEDS, report=events.append)
        assert raised.value.remedy == "fetch them"
        assert raised.value.exit_code is ExitCode.DATA
        with pytest.raises(PeerLostError, match="`a test` was lost"):
            run_as_task(_dies, needs=NEEDS, report=events.append)
        with pytest.raises(ZeroDivisionError):
            run_as_task(_breaks, needs=NEEDS, report=events.append)
    in_process = run_probe(_request(folder, "in-process"), report=lambda _: None)
    assert [_numbers(record) for record in through_ray] == [_numbers(r) for r in in_process]
    assert len(through_ray) == 3
    assert {"step 20: encode train videos", "step 20: fit linear, seed 0"} <= {
        event.phase for event in events if event.done == event.total
    }


def test_scores_of_other_settings_are_kept_apart_and_named(folder):
    request, events = replace(_request(folder, "twice"), heads=("knn",)), []
    first = run_probe(request, report=events.append)
    assert run_probe(request, report=events.append)[0].top1 == first[0].top1
    assert not (request.out / "earlier").exists(), "the same settings replace their own scores"
    before = (request.out / f"{request.stem}.json").read_text()
    other = request.task.model_copy(update={"knn": KnnConfig(k=1)})
    run_probe(replace(request, task=other), report=events.append)
    (earlier,) = (request.out / "earlier").iterdir()
    assert earlier.read_text() == before
    assert str(earlier) in events[-1].phase
    assert (
        json.loads((request.out / f"{request.stem}.json").read_text())["task_config"]["knn"]["k"]
        == 1
    )


def _fails(*, report):
    raise DataError("five videos are gone", remedy="fetch them")


def _dies(*, report):
    os._exit(9)


def _breaks(*, report):
    return 1 / 0


def _probe(folder, *words):
    task = str(folder / "task.yaml")
    return main(["probe", str(folder / "run"), "--task", task, "--no-ray", *words])


def _request(folder, name):
    return ProbeRequest(
        source=folder / "run" / "checkpoints" / "step-00000020",
        step=20,
        which="teacher",
        task=ssv2_task(folder / "set"),
        heads=("attentive", "linear", "knn"),
        seeds=(0,),
        out=folder / name,
    )


def _numbers(record):
    return (record.head, record.top1, record.curve, record.sweep, record.encoder_digest)
