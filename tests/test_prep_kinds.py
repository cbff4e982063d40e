"""Every kind of source: what it is recognised as, what it lists, and what a batch gets of it."""

import io
import json
import os
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from data_prep.kinds.opening import open_sources, recognised
from data_prep.kinds.still import still_clip
from data_prep.kinds.trajectory import episode, read_trajectory
from data_prep.records import Source
from data_prep.settings import PrepSettings
from pipeline.cli import main
from pipeline.data.badmedia import BadMediaError
from pipeline.data.decode import DecodeLimits, decode_frames, probe_media
from pipeline.errors import ExitCode, UsageError
from tests.shards import render_video

TEMPLATES = {"Folding [something]": "0", "Putting [something] near [something]": "1"}


def listed(*arguments: object, **how) -> tuple[list[Source], dict[str, str]]:
    others: dict[str, str] = {}
    found = open_sources([str(one) for one in arguments], on_other=others.__setitem__, **how)
    return list(found), others


def video(path: Path, seed: int = 0, num_frames: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render_video(seed, num_frames))
    return path


def write_ssv2(root: Path, prefix: str = "", labels: str = "labels") -> Path:
    classes = {key.replace("[", "").replace("]", ""): value for key, value in TEMPLATES.items()}
    train = [
        {"id": "11", "label": "folding a map", "template": "Folding [something]",
         "placeholders": ["a map"]},
        {"id": "12", "label": "putting a cup near a jar",
         "template": "Putting [Something] near [something]".replace("S", "s"),
         "placeholders": ["a cup", "a jar"]},
        {"id": "13", "label": "x", "template": "Folding [something]", "placeholders": ["x"]},
    ]  # fmt: skip
    (root / labels).mkdir(parents=True)
    files = {"labels": classes, "train": train, "validation": train[:1], "test": [{"id": "11"}]}
    for name, content in files.items():
        (root / labels / f"{prefix}{name}.json").write_text(json.dumps(content))
    for number in (11, 12):
        video(root / "videos" / f"{number}.webm", number)
    return root


def write_episode(root: Path, serial: str = "123", *, frames: int = 20, rows: int = 21) -> Path:
    video(root / "recordings" / "MP4" / f"{serial}.mp4", 3, frames)
    known = {"left_mp4_path": f"success/x/recordings/MP4/{serial}.mp4", "lab": "LAB"}
    known["current_task"] = "put the cup on the plate"
    (root / "metadata_1.json").write_text(json.dumps(known))
    with h5py.File(root / "trajectory.h5", "w") as file:
        rng = np.random.default_rng(0)
        file["observation/robot_state/cartesian_position"] = rng.random((rows, 6))
        file["observation/robot_state/gripper_position"] = np.arange(rows) / rows
        file["action/cartesian_velocity"] = rng.random((rows, 6))
        file["action/gripper_position"] = rng.random(rows)
        stamps = 1_690_000_000_000 + np.arange(rows) * 67
        file[f"observation/timestamp/cameras/{serial}_estimated_capture"] = stamps
    return root


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2_of_either_name_set_gives_classes_by_template_and_captions_by_label(tmp_path, prefix):
    root = write_ssv2(tmp_path, prefix)
    assert recognised(str(root)) == "ssv2"
    found, others = listed(root)
    assert [source.name for source in found] == ["11.webm", "12.webm"]
    assert found[1].labels == {
        "class": 1,
        "template": "Putting something near something",
        "placeholders": "a cup; a jar",
        "split": "train",
    }
    assert [caption.text for caption in found[1].captions] == ["putting a cup near a jar"]
    assert others == {"13": f"{prefix}train.json, row 3: no 13.webm and no 13.mp4 in {root}/videos"}
    test, _ = listed(root / "labels" / f"{prefix}test.json")
    assert [(one.name, one.labels, one.captions) for one in test] == [
        ("11.webm", {"split": "test"}, ())
    ]
    (root / "labels" / "test-answers.csv").write_text("\ufeff11;Folding something\n\n")
    test, _ = listed(root / "labels" / f"{prefix}test.json")
    assert (test[0].labels or {})["class"] == 0


def test_kinetics_lines_and_the_official_table(tmp_path):
    video(tmp_path / "a b.mp4")
    video(tmp_path / "train" / "abcdefghijk_000012_000022.mp4")
    video(tmp_path / "whole.mp4")
    lines = tmp_path / "lines.csv"
    lines.write_text("a b.mp4 7\ngone.mp4 3\n")
    found, others = listed(lines)
    assert [(one.name, one.labels) for one in found] == [("a b.mp4", {"class": 7})]
    assert others == {"gone.mp4": f"lines.csv, row 2: no such file: {tmp_path}/gone.mp4"}
    table = tmp_path / "train.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\nswimming,abcdefghijk,12,22,train\n"
        "diving,whole,3,9.5,train\ndiving,gone,1,2,train\n"
    )
    assert recognised(str(table)) == "kinetics"
    found, others = listed(table)
    assert [(one.name, one.spans) for one in found] == [
        ("train/abcdefghijk_000012_000022.mp4", None),
        ("whole_000003_000009.mp4", ((3.0, 9.5),)),
    ]
    assert found[0].labels == {"label": "swimming", "split": "train"}
    assert list(others) == ["gone_000001_000002"]


def test_a_manifest_says_the_same_as_csv_and_as_parquet(tmp_path):
    video(tmp_path / "v" / "one.mp4")
    rows = {
        "path": ["v/one.mp4", "v/one.mp4"],
        "start": [0.0, 1.0],
        "end": [1.0, 2.0],
        "caption": ["first half", "second half"],
        "scene": ["007", "8"],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    lines = [",".join(map(str, row)) for row in zip(*rows.values(), strict=True)]
    (tmp_path / "t.csv").write_text("\n".join([",".join(rows), *lines]))
    found, _ = listed(tmp_path / "t.csv")
    from_parquet, _ = listed(f"table:{tmp_path}/t.parquet")
    assert [one.name for one in found] == ["v/one.mp4#0-1", "v/one.mp4#1-2"]
    assert [(one.t0, one.t1, one.text) for one in found[1].captions] == [(1.0, 2.0, "second half")]
    assert [one.labels for one in found] == [{"scene": "007"}, {"scene": 8}]
    assert [one.spans for one in found] == [one.spans for one in from_parquet]
    assert [one.name for one in found] == [one.name for one in from_parquet]
    nan, inf = float("nan"), float("inf")
    gaps = {"start": [nan, 1.0], "end": [nan, 2.0], "score": [nan, inf], "good": [True, False]}
    pq.write_table(pa.table({"path": rows["path"], **gaps}), tmp_path / "gaps.parquet")
    found, _ = listed(tmp_path / "gaps.parquet")
    assert [one.spans for one in found] == [None, ((1.0, 2.0),)]
    assert [one.labels for one in found] == [{"good": 1}, {"score": "inf", "good": 0}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "path,start,end\na.mp4,5,2\n", r"t\.csv, row 2: expected 0 <= start < end"),
        ("t.csv", "path,start,end\na.mp4,x,2\n", "row 2: expected seconds in the columns start"),
        ("t.csv", "path,a\nx.mp4\n", "row 2: expected 2 columns, got 1"),
        ("t.csv", "path,kind\nx.mp4,film\n", "row 2: expected one of video, image, episode"),
        ("t.csv", "path,captions\nx.mp4,[1]\n", "row 2: expected captions as"),
        ("t.csv", "file,label\nx.mp4,1\n", "row 1: expected a column `path` or `url`, got 'file,"),
        ("t.csv", "a.mp4 1\nb.mp4 cat\n", "row 2: expected `path label`"),
        ("t.csv", "a.mp4 1\nx.mp4 ²\n", "row 2: expected `path label`"),
        ("t.csv", f"a.mp4 1\nx.mp4 {'9' * 5000}\n", "row 2: expected `path label`"),
        ("t.csv", "youtube_id,time_start,time_end\nx,9,3\n", "row 2: expected time_end after"),
        ("t.csv", "youtube_id,time_start,time_end\n\udcff,1,2\n", "expected a row of CSV in UTF-8"),
        ("t.parquet", "no parquet", r"t\.parquet: expected a Parquet file"),
        ("train.json", "{}", "no labels.json beside it"),
    ],
)
def test_a_mistake_in_a_table_names_file_row_expected_and_got(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, errors="surrogateescape")
    for video_name in ("a.mp4", "x.mp4"):
        (tmp_path / video_name).write_bytes(b"x")
    with pytest.raises(UsageError, match=words):
        listed(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "kind", "content"),
    [
        ("l.txt", "list", "a.mp4"),
        ("k.csv", "kinetics", "a.mp4 7"),
        ("o.csv", "kinetics", "youtube_id,time_start,time_end\r\na,1,2"),
        ("t.csv", "table", "path,caption\r\na.mp4,b"),
    ],
)
def test_a_text_may_begin_with_a_mark_of_its_encoding_and_end_lines_twice(
    tmp_path, name, kind, content
):
    video(tmp_path / "a.mp4")
    (tmp_path / name).write_bytes(f"\ufeff{content}\r\n\r\n".encode())
    assert recognised(str(tmp_path / name)) == kind
    found, others = listed(tmp_path / name)
    assert [one.locator for one in found] == [str(tmp_path / "a.mp4")]
    assert others == {}


def test_lists_by_line_and_by_nul_and_captions_beside_the_videos(tmp_path):
    hostile = tmp_path / "new\nline.mp4"
    for path in (tmp_path / "a.mp4", hostile, tmp_path / "sub" / "-dash.WEBM"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "a.txt").write_text(" a  caption\n")
    (tmp_path / "sub" / "-dash.captions.json").write_text('[{"t0": 0, "t1": 1.5, "text": "b"}]')
    (tmp_path / "notes.md").write_text("n")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    found, others = listed(tmp_path)
    assert [one.name for one in found] == ["a.mp4", "new\nline.mp4", "sub/-dash.WEBM"]
    assert [[caption.text for caption in one.captions] for one in found] == [
        ["a caption"],
        [],
        ["b"],
    ]
    assert others == {
        "notes.md": "no video by its suffix",
        "sub/loop": "a link to a folder above it",
    }
    (tmp_path / "l.txt").write_text(f"a.mp4\n\n{tmp_path}/sub/-dash.WEBM\n{'x' * 10**5}\n")
    found, others = listed(tmp_path / "l.txt")
    assert [one.locator for one in found] == [f"{tmp_path}/a.mp4", f"{tmp_path}/sub/-dash.WEBM"]
    assert [reason[:13] for reason in others.values()] == ["l.txt, row 4:"]
    (tmp_path / "z.lst").write_bytes(b"new\nline.mp4\0a.mp4\0")
    assert [one.locator for one in listed(tmp_path / "z.lst")[0]] == [
        str(hostile),
        f"{tmp_path}/a.mp4",
    ]


def test_tars_of_others_give_videos_in_their_place_with_labels_and_captions(tmp_path):
    for number in range(2):
        with (tmp_path / f"{number:03d}.tar").open("wb") as file, wds.TarWriter(file) as writer:
            clip = {"jpg": b"thumb", "mp4": render_video(number, 9), "txt": "words", "cls": "5"}
            facts = {"scene": "s", "deep": {}, "none": float("nan"), "half": "\ud800"}
            writer.write({"__key__": f"x/{number}", **clip, "json": facts})
            writer.write({"__key__": "empty", "txt": "no video"})
    found, others = listed(tmp_path)
    assert [one.name for one in found] == ["000/x/0.mp4", "001/x/1.mp4"]
    assert found[0].labels == {"class": 5, "scene": "s", "half": "\\ud800"}
    assert [one.text for one in found[0].captions] == ["words"]
    assert others == {f"{n:03d}.tar/empty": "no video or picture in it" for n in range(2)}
    with Path(found[1].locator).open("rb") as file:
        file.seek(found[1].member_offset or 0)
        assert file.read(found[1].num_bytes) == render_video(1, 9)
    assert listed(f"{tmp_path}/{{000..001}}.tar")[0] == found
    whole = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(whole[:1024] + b"damage" + whole[1030:])
    assert any("001.tar" in name for name in listed(tmp_path)[1])


def test_addresses_are_listed_by_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/b/2.mp4", b"22")
    memory.pipe("/set/1.mp4", b"1")
    memory.pipe("/set/readme.md", b"r")
    memory.pipe("/set/t.csv", b"path,scene\nb/2.mp4,x\n")
    memory.pipe("/set/1.txt", b"one\n")
    memory.pipe("/set/b/2.captions.json", b'[{"t0": 0, "t1": 1.5, "text": "two"}]')
    memory.pipe("/set/b/1.txt", b"beside no video")
    found, others = listed("memory://set")
    assert [[caption.text for caption in one.captions] for one in found] == [["one"], ["two"]]
    assert [(one.name, one.locator, one.num_bytes) for one in found] == [
        ("1.mp4", "memory:///set/1.mp4", 1),
        ("b/2.mp4", "memory:///set/b/2.mp4", 2),
    ]
    assert set(others) == {"b/1.txt", "readme.md", "t.csv"}
    table, _ = listed("memory://set/t.csv")
    assert [(one.locator, one.labels) for one in table] == [
        ("memory://set/b/2.mp4", {"scene": "x"})
    ]
    with pytest.raises(UsageError, match="nosuch://x: cannot be reached"):
        listed("nosuch://x")


def test_a_store_that_lets_nobody_in_is_named_with_its_reason(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(UsageError, match="cannot be reached: Unable to locate credentials"):
        listed("s3://a-bucket/videos/")


def test_no_workers_and_a_file_for_the_folder_of_a_dataset_are_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    prep = ["prep", "run", str(tmp_path), "--out"]
    # Nobody at work would be waited for without end.
    assert main([*prep, str(tmp_path / "out"), "--workers", "0"]) == ExitCode.USAGE
    assert "--workers" in capsys.readouterr().err
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main([*prep, str(out)]) == ExitCode.USAGE
        assert "expected a folder, or none yet, got a file" in capsys.readouterr().err


def test_a_path_that_is_not_there_and_a_kind_that_is_not_are_usage_errors(tmp_path):
    for wrong in (tmp_path / "gone", f"folder:{tmp_path}/gone", "flm:/x", "y" * 10**5):
        with pytest.raises(UsageError, match="no such file or folder"):
            listed(wrong)


def test_a_picture_becomes_a_clip_of_its_own_colours_turned_as_it_says():
    picture = Image.new("RGB", (101, 60), (200, 40, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=98, exif=exif)
    clip = still_clip(buffer.getvalue(), PrepSettings())
    info = probe_media(clip, DecodeLimits(), decode_everything=True)
    assert (info.width, info.height, info.num_frames, info.fps) == (60, 101, 8, 8.0)
    frames = decode_frames(clip, np.array([0.0, 0.9]), DecodeLimits()).frames_THWC
    assert np.abs(frames.astype(int) - (200, 40, 90)).max() <= 4
    for damaged in (b"no picture", buffer.getvalue()[:200]):
        with pytest.raises(BadMediaError):
            still_clip(damaged, PrepSettings())


def test_an_episode_s_frames_stand_where_its_trajectory_says(tmp_path):
    root = write_episode(tmp_path)
    original = (root / "recordings" / "MP4" / "123.mp4").read_bytes()
    clip, trajectory = episode(original, str(root / "trajectory.h5"), "123")
    info = probe_media(clip, DecodeLimits(), decode_everything=True)
    assert info.num_frames == len(trajectory.times) == 20
    assert info.fps == pytest.approx(1000 / 67, rel=1e-3)
    moved = decode_frames(clip, trajectory.times, DecodeLimits()).frames_THWC
    before = decode_frames(original, np.arange(20) / 8, DecodeLimits()).frames_THWC
    assert (moved == before).all()
    members = trajectory.members(0.5, 1.0)
    times = np.load(io.BytesIO(members["times.npy"]))
    states = np.load(io.BytesIO(members["states.npy"]))
    # The row in force when the part begins is its first.
    assert times[0] == 0.0
    assert states[0, 6] == pytest.approx(7 / 21)
    assert len(times) == len(states) == len(np.load(io.BytesIO(members["actions.npy"]))) + 1


def test_an_episode_whose_lengths_disagree_or_whose_clock_stands_is_refused(tmp_path):
    root = write_episode(tmp_path / "a", rows=25)
    video_path = root / "recordings" / "MP4" / "123.mp4"
    with pytest.raises(BadMediaError, match="lengths disagree: 20 frames and 25 rows"):
        episode(video_path, str(root / "trajectory.h5"), "123")
    with h5py.File(root / "trajectory.h5", "a") as file:
        name = "observation/timestamp/cameras/123_estimated_capture"
        file[name][...] = 5
    with pytest.raises(BadMediaError, match="no ascending time stamps"):
        read_trajectory(str(root / "trajectory.h5"), "123")
    with h5py.File(root / "trajectory.h5", "a") as file:
        del file["observation/robot_state/gripper_position"]
        file["observation/robot_state/gripper_position"] = np.zeros(24)
    with pytest.raises(BadMediaError, match="lengths disagree"):
        read_trajectory(str(root / "trajectory.h5"), "123")
    np.savez(tmp_path / "t.npz", times=[0.0, 1.0], states=np.zeros((3, 7)))
    with pytest.raises(BadMediaError, match="lengths disagree"):
        read_trajectory(str(tmp_path / "t.npz"), "")
