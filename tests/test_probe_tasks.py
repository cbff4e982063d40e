"""Annotation files and task configurations: what is read, what is refused."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config.load import SHIPPED_CONFIGS, load_config, resolved_yaml
from pipeline.errors import ConfigError, DataError
from pipeline.probe.annotations import read_task
from pipeline.probe.clips import read_ahead, segment_indices, segment_times
from pipeline.probe.tasks import ClipConfig, CsvData, TaskConfig
from tests.probe_data import TEMPLATES, ssv2_task, write_json, write_ssv2


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_both_name_sets_give_the_same_task(tmp_path, prefix):
    folder = write_ssv2(tmp_path / "set", train=5, validation=3, prefix=prefix)
    videos = read_task(ssv2_task(folder))
    assert [video.key for video in videos.train.videos] == ["1", "2", "3", "4", "5"]
    assert [video.key for video in videos.validation.videos] == ["6", "7", "8"]
    assert videos.class_names == tuple(t.replace("[", "").replace("]", "") for t in TEMPLATES)


def test_class_comes_from_the_template_without_brackets_never_from_the_sentence(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=3, validation=1)
    path = folder / "labels" / "train.json"
    entries = json.loads(path.read_text())
    entries[0]["label"] = "Showing a thing"  # the name of another class
    write_json(path, entries)
    video = read_task(ssv2_task(folder)).train.videos[0]
    assert video.label == 1
    assert entries[0]["template"] == "Moving [Something] right"


def test_a_webm_is_found_like_an_mp4(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=3, validation=1)
    (folder / "videos" / "2.mp4").rename(folder / "videos" / "2.webm")
    assert read_task(ssv2_task(folder)).train.videos[1].path.name == "2.webm"


def test_all_annotation_mistakes_come_at_once(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=4, validation=2)
    labels, train = folder / "labels" / "labels.json", folder / "labels" / "train.json"
    write_json(labels, {**json.loads(labels.read_text()), "Extra": "seven"})
    entries = json.loads(train.read_text())
    entries[0]["template"] = "Moving [something] lefft"
    del entries[1]["template"]
    entries[2]["id"] = "5"  # a validation video
    write_json(train, entries)
    with pytest.raises(DataError) as raised:
        read_task(ssv2_task(folder))
    text = str(raised.value)
    for part in (
        "expected a class number for 'Extra', got 'seven'",
        "entry 0: no class for template 'Moving something lefft'; the nearest is 'Moving something",
        "entry 1: expected an object with `id` and `template`",
        "in train and in validation, for example 5",
    ):
        assert part in text


def test_class_numbers_must_be_complete(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=3, validation=1)
    path = folder / "labels" / "labels.json"
    labels = json.loads(path.read_text())
    write_json(path, {name: ("9" if number == "2" else number) for name, number in labels.items()})
    with pytest.raises(DataError, match="class numbers 0 to 2, each once"):
        read_task(ssv2_task(folder))


def test_files_that_are_not_json_are_named(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=3, validation=1)
    (folder / "labels" / "train.json").write_text("[{")
    with pytest.raises(DataError, match=r"train\.json: not JSON"):
        read_task(ssv2_task(folder))


def test_missing_videos_are_counted_up_to_the_budget_and_stop_above_it(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=4, validation=2)
    (folder / "videos" / "3.mp4").unlink()
    tolerant = read_task(ssv2_task(folder, max_bad_share=0.25))
    assert [(fault.key, fault.reason) for fault in tolerant.train.faults] == [("3", "missing")]
    assert len(tolerant.train.videos) == 3
    with pytest.raises(DataError, match=r"1 of the 4 train videos .*0 are tolerated.*3: missing"):
        read_task(ssv2_task(folder, max_bad_share=0.2))


def test_a_wrong_folder_names_the_key_and_the_nearest_folder(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=3, validation=1)
    task = ssv2_task(folder)
    wrong = task.data.model_copy(update={"videos": folder / "vidoes"})
    with pytest.raises(ConfigError, match=r"`data\.videos`.*the nearest is 'videos'"):
        read_task(task.model_copy(update={"data": wrong}))


def test_limits_take_the_same_videos_every_time_even_over_classes(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=30, validation=3)
    task = ssv2_task(folder, max_train=9)
    labels = [video.label for video in read_task(task).train.videos]
    assert sorted(labels) == [0] * 3 + [1] * 3 + [2] * 3
    assert read_task(task) == read_task(task)


def test_csv_lines_give_paths_and_labels_and_spaces_in_paths_are_fine(tmp_path):
    for name in ("a clip.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train.csv").write_text("a clip.mp4 1\nb.mp4 0\n\n")
    (tmp_path / "validation.csv").write_text(f"{tmp_path}/c.mp4 1\n")
    videos = read_task(_csv_task(tmp_path))
    assert [(v.path.name, v.label) for v in videos.train.videos] == [
        ("a clip.mp4", 1),
        ("b.mp4", 0),
    ]
    assert videos.validation.videos[0].path == tmp_path / "c.mp4"
    assert len(videos.class_names) == 2


def test_every_bad_csv_line_is_named_with_its_number(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4\na.mp4 x\n")
    (tmp_path / "validation.csv").write_text("")
    with pytest.raises(DataError) as raised:
        read_task(_csv_task(tmp_path))
    for part in ("train.csv:1:", "train.csv:2:", "validation.csv: expected at least one line"):
        assert part in str(raised.value)


def test_clips_need_exactly_one_rate():
    for rates in ({}, {"fps": 4.0, "frame_step": 4}):
        with pytest.raises(ValidationError, match="exactly one of `frame_step` and `fps`"):
            ClipConfig(**rates)


def test_frame_step_segments_equal_the_published_vector():
    clip = ClipConfig(frames=16, frame_step=4, segments=2)
    found = segment_indices(clip, num_frames=45, units=np.full(2, 0.5))
    expected = [0, 4, 8, 13, 17, 22, 26, 30, 35, 39, 43, 43, 43, 43, 43, 43]
    assert found.tolist() == [expected, expected]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 17, 64, 65, 100, 128, 129, 130, 1000])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_frame_numbers_ascend_and_exist_for_any_length(num_frames, segments):
    clip = ClipConfig(frames=16, frame_step=4, segments=segments)
    for unit in (0.0, 0.5, 0.999):
        found = segment_indices(clip, num_frames=num_frames, units=np.full(segments, unit))
        assert found.shape == (segments, 16)
        assert (np.diff(found, axis=1) >= 0).all()
        assert found.min() >= 0
        assert found.max() < num_frames


def test_segments_by_rate_lie_in_their_parts_of_a_long_video_and_overlap_in_a_short_one():
    clip = ClipConfig(frames=8, fps=4.0, segments=2)  # a segment lasts two seconds
    long = segment_times(clip, duration_seconds=10, num_frames=0, units=np.array([0.0, 1.0]))
    assert long[0].tolist() == [number / 4 for number in range(8)]
    assert long[1].tolist() == [8 + number / 4 for number in range(8)]
    short = segment_times(clip, duration_seconds=3, num_frames=0, units=np.full(2, 0.5))
    assert short[:, 0].tolist() == [0.0, 1.0]


def test_reading_ahead_keeps_the_order_and_raises_what_was_raised():
    assert list(read_ahead(lambda x: x * x, range(50), threads=3)) == [x * x for x in range(50)]

    def fails_at_seven(x):
        if x == 7:
            raise KeyError(x)
        return x

    with pytest.raises(KeyError):
        list(read_ahead(fails_at_seven, range(50), threads=2))


@pytest.mark.parametrize(
    "path", sorted((SHIPPED_CONFIGS / "probes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_tasks_load_and_load_back_equal(path, tmp_path):
    task = load_config(path, TaskConfig).config
    assert task.name == path.stem
    again = tmp_path / "task.yaml"
    again.write_text(resolved_yaml(task))
    assert load_config(again, TaskConfig).config == task


def _csv_task(folder):
    data = CsvData(kind="csv", train=folder / "train.csv", validation=folder / "validation.csv")
    return TaskConfig(name="listed", data=data, clip=ClipConfig(fps=4.0))
