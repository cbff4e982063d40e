"""Where labelled videos may lie: class folders, pictures, our shards, the official test split."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.clip import SampleFault
from pipeline.data.layout import Sidecar
from pipeline.errors import ConfigError, DataError
from pipeline.probe.annotations import read_task
from pipeline.probe.chunks import Extraction
from pipeline.probe.clips import ClipReader
from pipeline.probe.frozen import freeze
from pipeline.probe.tasks import Augmentation, ClipConfig, FolderData, ShardData
from tests.probe_data import TEMPLATES, ssv2_task, tiny_encoder, write_json, write_ssv2
from tests.shards import write_dataset


def test_class_folders_are_numbered_by_the_alphabet_and_keys_name_their_split(tmp_path):
    _pictures(tmp_path / "train", {"b": 2, "a": 1})
    _pictures(tmp_path / "val", {"a": 2})
    videos = read_task(_folders(tmp_path))
    assert videos.class_names == ("a", "b")
    assert [(v.key, v.label) for v in videos.train.videos] == [
        ("train/a/0.png", 0),
        ("train/b/0.png", 1),
        ("train/b/1.png", 1),
    ]
    assert [v.label for v in videos.validation.videos] == [0, 0]


def test_a_class_that_training_has_not_got_is_named_with_the_nearest(tmp_path):
    _pictures(tmp_path / "train", {"terrier": 1, "tabby": 1})
    _pictures(tmp_path / "val", {"terier": 1})
    with pytest.raises(DataError, match=r"no class of this name; the nearest is 'terrier'"):
        read_task(_folders(tmp_path))
    with pytest.raises(ConfigError, match=r"`data\.validation`"):
        read_task(_folders(tmp_path, "nowhere"))


def test_a_picture_is_a_clip_that_stands_still_and_a_broken_one_a_fault(tmp_path):
    _pictures(tmp_path / "train", {"a": 2})
    _pictures(tmp_path / "val", {"a": 1})
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    split = read_task(_folders(tmp_path)).train
    clip = ClipConfig(frames=4, frame_step=1, resolution=32)
    reader = ClipReader(split, clip, num_views=1, augmentation=Augmentation())
    video_CTHW = reader.read(0).video_VSCTHW[0, 0]
    assert video_CTHW.shape == (3, 4, 32, 32)
    assert (video_CTHW == video_CTHW[:, :1]).all()
    shown = np.asarray(Image.open(split.videos[0].path))
    assert torch.equal(video_CTHW[:, 0], torch.from_numpy(shown[:, 4:36].copy()).permute(2, 0, 1))
    assert isinstance(reader.read(1), SampleFault)


def test_a_picture_turned_by_its_header_is_shown_upright(tmp_path):
    _pictures(tmp_path / "train", {"a": 1})
    _pictures(tmp_path / "val", {"a": 1})
    path = tmp_path / "train" / "a" / "0.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    with Image.open(path) as picture:
        upright = np.asarray(picture)
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    split = read_task(_folders(tmp_path)).train
    clip = ClipConfig(frames=2, frame_step=1, resolution=32)
    reader = ClipReader(split, clip, num_views=1, augmentation=Augmentation())
    found = reader.read(0).video_VSCTHW[0, 0, :, 0]
    assert torch.equal(found, torch.from_numpy(upright[:, 4:36].copy()).permute(2, 0, 1))


def test_samples_of_shards_are_read_with_the_class_of_their_sidecar(tmp_path):
    _shards(tmp_path / "train", 4, 0)
    _shards(tmp_path / "val", 2, 50)
    task = _of_shards(tmp_path)
    videos = read_task(task)
    assert videos.class_names == ("falling", "rising")
    by_key = {video.key: video for video in videos.train.videos}
    assert len(by_key) == 4
    assert all(video.label == int(video.key[-1]) % 2 for video in by_key.values())
    clip = ClipConfig(frames=4, fps=4.0, resolution=32)
    reader = ClipReader(videos.train, clip, num_views=1, augmentation=Augmentation())
    first, second = (reader.read(place).video_VSCTHW for place in (0, 1))
    assert first.shape == (1, 1, 3, 4, 32, 32)
    assert not torch.equal(first, second)
    keys = [_asked(task, videos.train).key(), _asked(task, videos.validation).key()]
    assert len(set(keys)) == 2
    assert _asked(task, read_task(task).train).key() == keys[0]


def test_samples_without_the_label_are_counted_and_the_labels_they_have_named(tmp_path):
    _shards(tmp_path / "train", 4, 0)
    _shards(tmp_path / "val", 2, 50)
    with pytest.raises(DataError, match=r"4 of 4 samples have no label 'klass'.*labels are motion"):
        read_task(_of_shards(tmp_path, label="klass"))


def test_the_official_test_split_takes_its_classes_from_the_answers(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=3, validation=3)
    labels = folder / "labels"
    write_json(labels / "test.json", [{"id": "4"}, {"id": "6"}])
    (labels / "test-answers.csv").write_text(f"6;{TEMPLATES[0]}\n4;{TEMPLATES[1]}\n")
    task = ssv2_task(folder)
    tested = task.model_copy(update={"data": task.data.model_copy(update={"judged": "test"})})
    found = read_task(tested).validation.videos
    assert [(video.key, video.label) for video in found] == [("4", 1), ("6", 0)]
    (labels / "test-answers.csv").write_text(f"6;{TEMPLATES[0]}\n")
    with pytest.raises(DataError, match="no answer for the test video 4"):
        read_task(tested)


@pytest.mark.parametrize("order", ["shuffled", "reversed"])
def test_frames_in_another_order_are_the_same_frames_and_always_that_order(tmp_path, order):
    folder = write_ssv2(tmp_path / "set", train=3, validation=3)
    split = read_task(ssv2_task(folder)).train
    found = {}
    for name in ("forward", order, order + " again"):
        clip = ClipConfig(frames=8, fps=8.0, resolution=32, frame_order=name.removesuffix(" again"))
        reader = ClipReader(split, clip, num_views=1, augmentation=Augmentation())
        found[name] = reader.read(0).video_VSCTHW[0, 0]
    assert torch.equal(found[order], found[order + " again"])
    assert not torch.equal(found[order], found["forward"])
    if order == "reversed":
        assert torch.equal(found[order], found["forward"].flip(1))
    sums = {
        name: sorted(video.float().sum(dim=(0, 2, 3)).tolist()) for name, video in found.items()
    }
    assert sums[order] == sums["forward"]


def _pictures(folder: Path, classes: dict[str, int]) -> None:
    generator = np.random.default_rng(len(classes))
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def _folders(folder: Path, validation: str = "val"):
    data = FolderData(kind="folders", train=folder / "train", validation=folder / validation)
    return ssv2_task(None, data=data)


def _shards(folder: Path, count: int, seed: int) -> None:
    """Samples whose class alternates; the helper's own sidecar is taken and labelled."""
    plain = write_dataset(folder.with_name(f"{folder.name}-plain"), count, first_seed=seed)
    sidecars = _sidecars(plain)

    def labelled(number: int) -> dict[str, bytes]:
        sidecar = sidecars[number]
        word = ("falling", "rising")[int(sidecar.key[-1]) % 2]
        changed = sidecar.model_copy(update={"labels": {"motion": word}})
        return {"json": changed.model_dump_json().encode()}

    write_dataset(folder, count, first_seed=seed, extra=labelled)


def _sidecars(folder: Path) -> dict[int, Sidecar]:
    found = {}
    for shard, path in enumerate(sorted(folder.glob("*.tar"))):
        with tarfile.open(path) as tar:
            members = [m for m in tar.getmembers() if m.name.endswith(".json")]
            for place, member in enumerate(members):
                payload = tar.extractfile(member).read()
                found[2 * place + shard] = Sidecar.model_validate_json(payload)
    return found


def _of_shards(folder: Path, label: str = "motion"):
    data = ShardData(
        kind="shards", train=(folder / "train",), validation=(folder / "val",), label=label
    )
    return ssv2_task(None, data=data)


def _asked(task, split):
    return Extraction(
        encoder=freeze(tiny_encoder(), task), split=split, task=task, num_views=1, keep_tokens=False
    )
