"""Tars that others wrote: indexed where they lie, trained on, read by plain webdataset."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data_prep.adopt import index_tars
from data_prep.lint import lint
from pipeline.cli import main
from pipeline.data.format import ShardIndex
from pipeline.data.loader import make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.errors import DataError, UsageError
from pipeline.masks.collate import collate_plan
from tests.shards import make_plans, render_video, write_dataset


def write_foreign(folder: Path, shards: int = 2) -> Path:
    """Samples as other tools write them: keys with folders, texts, classes, thumbnails."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with (
            (folder / f"{shard:06d}.tar").open("wb") as file,
            wds.TarWriter(file, encoder=False) as writer,
        ):
            for number in range(3):
                seed = shard * 3 + number
                # The same keys in every shard, as many sets have them.
                writer.write(
                    {
                        "__key__": f"part/{number:09d}",
                        "jpg": b"\xff\xd8thumbnail",
                        "mp4": render_video(seed, 12 + seed),
                        "txt": f"clip {seed}".encode(),
                        "cls": str(seed).encode(),
                        "json": json.dumps({"width": 64}).encode(),
                    }
                )
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_foreign(tmp_path_factory.mktemp("foreign") / "set")
    before = [path.read_bytes() for path in sorted(folder.glob("*.tar"))]
    index_tars(folder, folder, workers=2)
    assert [path.read_bytes() for path in sorted(folder.glob("*.tar"))] == before
    return folder


def test_foreign_tars_reach_a_batch_with_their_texts(foreign):
    config = DataConfig(sources=(Source(path=str(foreign)),), workers=0, companions=("captions",))
    collate = partial(collate_plan, seed=5)
    texts = set()
    with make_loader(config, plans=make_plans(), collate=collate, seed=5) as loader:
        for batch in loader:
            assert batch.faults == ()
            texts |= set(batch.text or ())
    assert texts == {f"clip {seed}" for seed in range(6)}


def test_the_index_says_what_decodes_and_keys_that_repeat_are_told_apart(foreign):
    index = ShardIndex.open(foreign)
    records = [index.record(number) for number in range(len(index))]
    assert [record.num_frames for record in records] == list(range(12, 18))
    assert [round(record.duration_seconds * 8) for record in records] == list(range(12, 18))
    assert {(record.fps, record.width, record.height) for record in records} == {(8.0, 64, 48)}
    assert len({record.key for record in records}) == 6
    assert index.manifest.members == ("video", "captions")
    report = lint(foreign, every=1)
    assert (report.num_decoded, report.findings) == (6, ())


def test_a_full_decode_and_the_packets_say_the_same(foreign, tmp_path):
    index_tars(foreign, tmp_path / "out", decode_everything=True)
    whole, packets = ShardIndex.open(tmp_path / "out"), ShardIndex.open(foreign)
    assert (whole.records == packets.records).all()
    assert (tmp_path / "out" / "000000.tar").is_symlink()


def test_our_own_shards_get_the_index_they_had(tmp_path):
    folder = write_dataset(tmp_path / "set", 4)
    before = (folder / "index.npy").read_bytes()
    (folder / "manifest.json").unlink()
    index_tars(folder, folder)
    assert (folder / "index.npy").read_bytes() == before
    assert ShardIndex.open(folder).manifest.members == ("video", "sidecar")


def test_what_prep_writes_reads_in_plain_webdataset(tmp_path):
    folder = write_dataset(tmp_path / "set", 4)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert sorted(one["__key__"] for one in found) == [f"clip-{n:05d}" for n in range(4)]
    assert all(one["mp4"][4:8] == b"ftyp" and json.loads(one["json"])["key"] for one in found)


def test_samples_that_cannot_be_used_are_left_out_and_named(tmp_path, capfd):
    folder = tmp_path / "set"
    folder.mkdir()
    with (folder / "a.tar").open("wb") as file, wds.TarWriter(file, encoder=False) as writer:
        writer.write({"__key__": "good", "webm": render_video(1, 16)})
        writer.write({"__key__": "broken", "mp4": b"nothing of a video"})
        writer.write({"__key__": "textonly", "txt": b"words"})
    assert main(["prep", "index", str(folder), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["rejected"] == {"not a video": 1, "missing member": 1}
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["a.tar/broken", "a.tar/textonly"]
    assert [ShardIndex.open(folder).record(0).key] == ["good"]
    assert main(["prep", "index", str(folder)]) == 2
    assert "a dataset already, indexed before" in capfd.readouterr().err


def test_a_damaged_tar_stops_with_its_name_and_what_to_do(tmp_path):
    folder = write_foreign(tmp_path / "set", shards=1)
    tar = folder / "000000.tar"
    content = tar.read_bytes()
    for damaged in (content[: len(content) // 2], content[:1024] + b"x" + content[1025:]):
        tar.write_bytes(damaged)
        with pytest.raises(DataError, match=r"000000\.tar") as caught:
            index_tars(folder, folder)
        assert "Fetch or write this tar again" in caught.value.remedy
    assert not (folder / "manifest.json").exists()


def test_names_that_no_shard_can_have_are_linked_elsewhere(tmp_path):
    folder = write_foreign(tmp_path / "set", shards=1)
    (folder / "000000.tar").rename(folder / "train-0.0 part.tar")
    with pytest.raises(UsageError, match="names that are not fit"):
        index_tars(folder, folder)
    index_tars(folder, tmp_path / "out")
    assert len(ShardIndex.open(tmp_path / "out")) == 3
    with pytest.raises(UsageError, match=r"no \*\.tar"):
        index_tars(tmp_path, tmp_path / "other")


def test_an_index_with_a_sidecar_cut_out_is_still_refused(tmp_path):
    folder = write_dataset(tmp_path / "set", 4)
    from pipeline.data.rawfile import check_places  # noqa: PLC0415

    index = ShardIndex.open(folder)
    records = np.array(index.records)
    records["sidecar"]["length"][1] = 0
    with pytest.raises(DataError, match="sidecar of sample 1"):
        check_places(records, index.manifest.shards, index.manifest.members, folder)
