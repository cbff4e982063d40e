"""A synthetic data set on disk: official label files, the same bytes, resumable, never mixed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

import pytest

from data_prep.commands import synthetic
from data_prep.synthetic.dataset import SyntheticConfig, write_dataset
from data_prep.synthetic.scene import draw_scene
from pipeline.errors import StorageError, UsageError

CONFIG = SyntheticConfig(videos=30, validation=13, test=7, size=32, seconds=1.0, fps=6, pairs=6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "set"
    write_dataset(out, CONFIG, workers=1)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def test_label_files_read_by_the_rule_of_the_original_data_set(dataset: Path) -> None:
    labels = read_json(dataset / "labels" / "labels.json")
    assert list(labels) == sorted(labels)
    assert sorted(labels.values(), key=int) == [str(number) for number in range(12)]
    for split, count in (("train", 30), ("validation", 13)):
        entries = read_json(dataset / "labels" / f"{split}.json")
        assert len(entries) == count
        for entry in entries:
            assert set(entry) == {"id", "label", "template", "placeholders"}
            assert entry["id"].isdigit()
            assert entry["template"].replace("[", "").replace("]", "") in labels
            between = re.split(r"\[.*?\]", entry["template"])
            words = zip_longest(between, entry["placeholders"], fillvalue="")
            assert "".join(part for pair in words for part in pair) == entry["label"]
            assert len(entry["placeholders"]) == len(between) - 1
            assert (dataset / "videos" / f"{entry['id']}.mp4").stat().st_size > 0


def test_answers_of_the_test_split_stand_apart(dataset: Path) -> None:
    entries = read_json(dataset / "labels" / "test.json")
    assert all(set(entry) == {"id"} for entry in entries)
    labels = read_json(dataset / "labels" / "labels.json")
    with (dataset / "labels" / "test-answers.csv").open(encoding="utf-8", newline="") as file:
        answers = dict(csv.reader(file, delimiter=";"))
    assert list(answers) == [entry["id"] for entry in entries]
    assert len(answers) == 7
    assert set(answers.values()) <= set(labels)


def test_splits_share_no_video_and_there_is_no_video_beside_them(dataset: Path) -> None:
    ids = [
        entry["id"]
        for split in ("train", "validation", "test")
        for entry in read_json(dataset / "labels" / f"{split}.json")
    ]
    assert len(ids) == len(set(ids)) == 50
    assert {path.name for path in (dataset / "videos").iterdir()} == {f"{i}.mp4" for i in ids}


def test_classes_are_balanced_in_every_split(dataset: Path) -> None:
    for split in ("train", "validation"):
        entries = read_json(dataset / "labels" / f"{split}.json")
        counts = Counter(entry["template"] for entry in entries)
        assert len(counts) == 12
        assert max(counts.values()) - min(counts.values()) <= 1


def test_annotations_say_what_the_video_shows(dataset: Path) -> None:
    recipe = CONFIG.recipe
    for entry in read_json(dataset / "labels" / "train.json"):
        scene = draw_scene(recipe.seed, int(entry["id"]), recipe.num_pairs, recipe.shape)
        assert entry["template"] == scene.template
        assert entry["placeholders"] == list(scene.placeholders)


def test_files_do_not_depend_on_the_number_of_workers(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", CONFIG, workers=2)
    assert contents(tmp_path / "set") == contents(dataset)


def test_another_seed_gives_other_videos(dataset: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, seed=1, videos=3, validation=0, test=0)
    write_dataset(tmp_path / "set", config, workers=1)
    ours, theirs = contents(tmp_path / "set"), contents(dataset)
    assert all(ours[f"videos/{n}.mp4"] != theirs[f"videos/{n}.mp4"] for n in (1, 2, 3))


def test_a_second_run_touches_nothing(dataset: Path) -> None:
    before = stamps(dataset)
    report = write_dataset(dataset, CONFIG, workers=2)
    assert (report.num_written, report.num_kept) == (0, 50)
    assert stamps(dataset) == before


def test_a_second_run_writes_only_what_is_missing(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    write_dataset(out, CONFIG, workers=1)
    whole = contents(out)
    (out / "videos" / "7.mp4").unlink()
    (out / "videos" / "21.mp4").write_bytes(b"")  # as a crash of the machine leaves it
    (out / "labels" / "train.json").unlink()
    (out / "videos" / ".9.123.partial").write_bytes(b"half a video")
    kept = stamps(out / "videos")
    report = write_dataset(out, CONFIG, workers=1)
    assert report.num_written == 2
    assert contents(out) == whole
    after = stamps(out / "videos")
    assert [path for path in kept if path in after and kept[path] != after[path]] == [
        str(out / "videos" / "21.mp4")
    ]


def test_other_parameters_are_refused_unless_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "set"
    small = replace(CONFIG, videos=4, validation=2, test=1)
    write_dataset(out, small, workers=1)
    before = contents(out)
    other = replace(small, seed=5, videos=3)
    with pytest.raises(UsageError, match=r"seed 0 there and 5 asked, videos 4 there and 3 asked"):
        write_dataset(out, other, workers=1)
    assert contents(out) == before
    write_dataset(out, other, workers=1, overwrite=True)
    fresh = tmp_path / "fresh"
    write_dataset(fresh, other, workers=1)
    assert contents(out) == contents(fresh)


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="no synthetic data set"):
            write_dataset(tmp_path, CONFIG, workers=1, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.tex": b"ten years of work"}


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        write_dataset(tmp_path / "file", CONFIG, workers=1)


def test_a_file_system_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Not a directory"):
        write_dataset(tmp_path / "file" / "set", CONFIG, workers=1)


def test_wrong_parameters_are_listed_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        SyntheticConfig(videos=0, size=113, pairs=11, difficulty=1.5)
    for flag in ("--videos", "--size", "--pairs", "--difficulty"):
        assert flag in str(caught.value)


def test_parameters_stand_in_the_folder(dataset: Path) -> None:
    written = read_json(dataset / "synthetic.json")
    assert {key: written[key] for key in asdict(CONFIG)} == asdict(CONFIG)


def test_the_verb_reports_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, videos=2, validation=1, test=0)
    synthetic(tmp_path / "set", config, workers=1, json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["num_written"] == 3
    assert report["num_classes"] == 12


def test_an_interrupt_leaves_whole_videos_and_a_rerun_finishes(tmp_path: Path) -> None:
    out = tmp_path / "set"
    code = (
        "from pathlib import Path\n"
        "from data_prep.synthetic.dataset import SyntheticConfig, write_dataset\n"
        "if __name__ == '__main__':\n"
        f"    config = SyntheticConfig(videos=400, validation=1, test=0, size=32, fps=6)\n"
        f"    write_dataset(Path({str(out)!r}), config, workers=2)\n"
    )
    (tmp_path / "program.py").write_text(code)
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("videos/*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.decode().strip().endswith("KeyboardInterrupt")
    written = [path for path in (out / "videos").iterdir() if path.suffix == ".mp4"]
    assert 0 < len(written) < 401
    assert not list((out / "videos").glob(".*"))
    assert not (out / "labels" / "train.json").exists()
    config = SyntheticConfig(videos=400, validation=1, test=0, size=32, fps=6)
    report = write_dataset(out, config, workers=1)
    assert report.num_kept == len(written)
    assert len(list((out / "videos").iterdir())) == 401
