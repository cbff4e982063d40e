"""One preparation of sources of every kind, from their files to a batch."""

import io
import json
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_prep.driver import Workers
from data_prep.prepare import Inputs, prepare
from data_prep.settings import PrepSettings
from pipeline.data.format import ShardIndex
from pipeline.data.layout import Member
from pipeline.data.loader import make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.masks.collate import collate_plan
from tests.s3 import s3_server
from tests.shards import make_plans, render_video
from tests.test_prep_kinds import video, write_episode, write_ssv2


def write_everything(root: Path) -> list[str]:
    """One argument per kind; videos differ, so that none is left out as a duplicate."""
    write_ssv2(root / "ssv2")
    video(root / "kinetics" / "k.mp4", 31)
    (root / "kinetics" / "train.csv").write_text("k.mp4 7\n")
    video(root / "table" / "t.mp4", 32, 32)
    (root / "table" / "t.csv").write_text("path,start,end,caption\nt.mp4,1,3,the middle\n")
    (root / "tars").mkdir()
    with (root / "tars" / "000.tar").open("wb") as file, wds.TarWriter(file) as writer:
        writer.write({"__key__": "w", "mp4": render_video(33, 20), "txt": "from a tar", "cls": "5"})
        png = io.BytesIO()
        Image.new("RGB", (80, 60), (10, 200, 30)).save(png, "PNG")
        writer.write({"__key__": "p", "png": png.getvalue()})
    (root / "images" / "cat").mkdir(parents=True)
    Image.radial_gradient("L").resize((80, 60)).save(root / "images" / "cat" / "i.jpg")
    write_episode(root / "robot" / "lab" / "e1")
    write_episode(root / "robot" / "lab" / "e2", frames=20, rows=30)
    return [str(root / name) for name in ("ssv2", "kinetics/train.csv", "table/t.csv", "tars",
                                          "images", "robot")]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("kinds")
    arguments = write_everything(root)
    with s3_server():
        store = fsspec.filesystem("s3")
        store.mkdir("videos")
        store.pipe_file("videos/set/s.mp4", render_video(34, 16))
        inputs = Inputs(arguments=(*arguments, "s3://videos/set"))
        prepare(inputs, root / "out", PrepSettings(), workers=Workers(num_cpus=2))
    return root / "out"


def by_source(dataset: Path):
    index = ShardIndex.open(dataset)
    records = [index.record(number) for number in range(len(index))]
    return index, {index.read_sidecar(record).source: record for record in records}


def test_every_kind_gives_samples_with_what_it_knows(dataset):
    index, records = by_source(dataset)
    labels = {name: index.read_sidecar(record).labels for name, record in records.items()}
    assert set(labels) == {
        *("11.webm", "12.webm", "k.mp4", "t.mp4#1-3", "000/w.mp4", "000/p.png", "cat/i.jpg"),
        *("lab/e1/123.mp4", "s.mp4"),
    }
    assert (labels["11.webm"] or {})["class"] == 0
    assert labels["k.mp4"] == {"class": 7}
    assert labels["000/w.mp4"] == {"class": 5}
    assert labels["cat/i.jpg"] == {"class": "cat"}
    texts = {
        name: [(one.t0, one.t1, one.text) for one in index.read_captions(record)]
        for name, record in records.items()
        if record.place(Member.CAPTIONS).length
    }
    assert texts["t.mp4#1-3"] == [(0.0, 2.0, "the middle")]
    assert texts["12.webm"] == [
        (0.0, records["12.webm"].duration_seconds, "putting a cup near a jar")
    ]
    assert texts["lab/e1/123.mp4"][0][2] == "put the cup on the plate"


def test_an_episode_brings_its_states_on_the_clock_of_its_frames(dataset):
    index, records = by_source(dataset)
    record = records["lab/e1/123.mp4"]
    times = index.read_array(record, Member.TIMES)
    states = index.read_array(record, Member.STATES)
    assert np.allclose(times, np.arange(20) * 0.067, atol=1e-6)
    # The gripper was written as its row's number.
    assert np.allclose(states[:, 6], np.arange(20) / 21)
    assert len(index.read_array(record, Member.ACTIONS)) == 19


def test_an_episode_of_other_lengths_is_refused_and_missing_files_are_counted(dataset):
    lines = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    found = {line["source"]: (line["reason"], line["detail"]) for line in lines}
    reason, detail = found["lab/e2/123.mp4"]
    assert (reason, detail[:28]) == ("lengths disagree", "20 frames and 30 rows of the")
    assert found["13"][0] == "not a source"


def test_all_kinds_reach_a_batch_and_a_picture_stands_still(dataset):
    index, records = by_source(dataset)
    config = DataConfig(
        sources=(Source(path=str(dataset)),), workers=0, companions=("captions",), crop_scale=(1, 1)
    )
    still = {records[name].key for name in ("cat/i.jpg", "000/p.png")}
    seen = {}
    collate = partial(collate_plan, seed=5)
    with make_loader(config, plans=make_plans(), collate=collate, seed=5) as loader:
        for batch in loader:
            assert batch.faults == ()
            texts = batch.text or (None,) * len(batch.keys)
            for key, clip, text in zip(batch.keys, batch.video_BCTHW, texts, strict=True):
                change = (clip.int() - clip[:, :1].int()).abs().max()
                # The encoder mends its own errors from frame to frame.
                seen[key] = (int(change) <= 8, text)
    assert set(seen) == {record.key for record in records.values()}
    assert {key for key, (is_still, _) in seen.items() if is_still} == still
    assert seen[records["000/w.mp4"].key][1] == "from a tar"
    assert len(index) == len(seen)
