"""Confusion and hardest clips in the report: what the result says, and the pictures to it."""

import json
import re
import shutil

import numpy as np
import pytest

from pipeline.errors import StorageError
from pipeline.probe.evaluate import run_probe
from pipeline.probe.records import ProbeRequest
from pipeline.report.confusion import confusion_section, probe_details
from pipeline.report.page import write_report
from pipeline.report.probe_page import write_probe_page
from pipeline.track.folder import read_probes
from tests.probe_data import ssv2_task, write_run, write_ssv2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("confusion")
    write_ssv2(folder / "set", train=9, validation=7)
    (folder / "set" / "videos" / "16.mp4").write_bytes(b"")
    run_dir = write_run(folder, (0, 20))
    (run_dir / "run.json").write_text("{}")
    for step in (0, 20):
        request = ProbeRequest(
            source=run_dir / "checkpoints" / f"step-{step:08d}",
            step=step,
            which="teacher",
            task=ssv2_task(folder / "set", max_bad_share=0.2),
            heads=("linear", "knn"),
            seeds=(0, 1),
            out=run_dir / "probes",
        )
        run_probe(request, report=lambda _: None)
    return run_dir


def test_one_file_per_checkpoint_and_task_holds_every_head_seed_class_and_fault(run):
    paths = sorted((run / "probes").glob("*.json"))
    assert [path.stem for path in paths] == [
        "squares-step00000000-teacher",
        "squares-step00000020-teacher",
    ]
    told = json.loads(paths[1].read_text())
    assert told["seeds"] == [0, 1]
    assert [(s["head"], s["seed"]) for s in told["scores"]] == [
        ("knn", 0),
        ("linear", 0),
        ("linear", 1),
    ]
    assert [(f["split"], f["key"]) for f in told["faults"]] == [("validation", "16")]
    for score in told["scores"]:
        assert score["num_val"] == 6  # seven, of which one is empty: none is dropped
        assert sum(num for _, _, num in score["confusion"]) == 6
        right = sum(num for truth, answer, num in score["confusion"] if truth == answer)
        assert right == sum(one["num_right"] for one in score["per_class"])
        assert right / 6 == pytest.approx(score["top1"])
        shares = [clip["share"] for clip in score["hardest"]]
        assert shares == sorted(shares)
    names = {score.name for score in read_probes(run)}
    assert "squares-step00000020-teacher-linear-seed1" in names


def test_the_report_shows_the_newest_checkpoints_best_head_with_pictures(run):
    (detail,) = probe_details(run / "probes")
    assert (detail.task, detail.step) == ("squares", 20)
    assert detail.counts().sum() == 6
    page = write_report(run).read_text()
    part = page[page.index("Where the probe is wrong") :]
    assert "Moving something left" in part
    assert "Hardest clips" in part
    assert len(re.findall(r'<img alt="\d+: ', part)) == 6


def test_results_have_a_page_without_a_run_and_the_students_are_kept_apart(run, tmp_path):
    folder = tmp_path / "probes"
    shutil.copytree(run / "probes", folder)
    told = json.loads((folder / "squares-step00000020-teacher.json").read_text())
    imported = {**told, "step": None, "task": "given"}
    (folder / "given-imported-teacher.json").write_text(json.dumps(imported))
    student = json.dumps({**told, "which": "student"})
    (folder / "squares-step00000020-student.json").write_text(student)
    page = write_probe_page(folder).read_text()
    assert f"Probes of {tmp_path.name}" in page
    for part in ("imported, teacher", "step 20, student", "head, imported weights"):
        assert part in page
    assert {one.which for one in probe_details(folder)} == {"teacher"}
    assert len(re.findall(r'<img alt="\d+: ', page)) == 6
    compared = {(one.head, one.step) for one in read_probes(tmp_path)}
    assert {("linear", 20), ("linear (student)", 20)} <= compared


def test_hostile_names_stay_text_and_many_classes_become_a_picture(tmp_path):
    names = [f"<b>class {number}</b>" for number in range(40)]
    score = {
        "head": "linear",
        "seed": 0,
        "top1": 0.5,
        "num_val": 40,
        "confusion": [[number, number // 2, 1] for number in range(40)],
        "per_class": [{"name": name, "num_clips": 1, "num_right": 0} for name in names],
        "hardest": [{"key": "<i>", "position": 3, "label": 3, "predicted": 1, "share": 0.1}],
    }
    told = {"task": "many", "step": 5, "class_names": names, "scores": [score]}
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "many.json").write_text(json.dumps(told))
    html = confusion_section(tmp_path / "probes")
    assert "confusion of classes, by their numbers" in html
    assert "&lt;b&gt;class 3&lt;/b&gt;" in html
    assert "<b>" not in html
    assert "<i>" not in html


def test_pictures_that_are_damaged_are_named_and_those_that_are_gone_are_not_missed(run, tmp_path):
    path = run / "probes" / "pictures" / "squares-step00000020-teacher.npz"
    whole = path.read_bytes()
    try:
        path.unlink()
        assert "without pictures" in confusion_section(run / "probes")
        path.write_bytes(b"PK garbage")
        with pytest.raises(StorageError, match="cannot read"):
            confusion_section(run / "probes")
    finally:
        path.write_bytes(whole)
    assert all(strip.dtype == np.uint8 for strip in np.load(path).values())


def test_a_run_whose_results_tell_no_confusion_has_no_such_section(tmp_path):
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "old.json").write_text(json.dumps({"task": "t", "top1": 0.5}))
    assert confusion_section(tmp_path / "probes") == ""
