"""Frozen features: equal to the encoder's own output, found again, and honest about bad videos."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import avg_pool3d

from data_prep.synthetic.encode import encode_h264
from pipeline.data.augment import normalise
from pipeline.data.decode import DecodeLimits, decode_frames
from pipeline.errors import ConfigError, DataError
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder
from pipeline.probe import chunks
from pipeline.probe.annotations import read_task
from pipeline.probe.cache import extract, prune
from pipeline.probe.chunks import Extraction
from pipeline.probe.clips import ClipReader
from pipeline.probe.evaluate import evaluate
from pipeline.probe.features import LiveInputs
from pipeline.probe.frozen import freeze
from pipeline.probe.records import ProbeRequest, wilson_interval
from pipeline.probe.tasks import Augmentation, ClipConfig, LinearConfig, RandAugment
from tests.probe_data import moving_square, ssv2_task, tiny_encoder, write_ssv2


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_ssv2(tmp_path_factory.mktemp("probe") / "set", train=12, validation=6)


def test_tokens_equal_a_direct_call_of_the_encoder_segments_joined_along_time(squares, tmp_path):
    task = ssv2_task(squares, precision="fp32")
    features = _extract(task, tmp_path, "train", num_views=1)
    encoder = tiny_encoder().eval()
    payload = (squares / "videos" / "1.mp4").read_bytes()
    # 1.5 s of video, segments of 1 s: they start at 0 and at 0.5 s.
    times = np.array([0, 0.25, 0.5, 0.75, 0.5, 0.75, 1.0, 1.25])
    order = np.argsort(times, kind="stable")
    frames = decode_frames(payload, times[order], DecodeLimits()).frames_THWC[np.argsort(order)]
    expected = []
    for part in (frames[:4], frames[4:]):
        video = torch.from_numpy(part).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            expected.append(encoder(normalise(video))[0])
    tokens_ND = torch.cat(expected)
    found = _tokens(features)[0, 0]
    torch.testing.assert_close(found, tokens_ND, atol=1e-2, rtol=1e-2)  # kept in bf16
    steps_PD = tokens_ND.unflatten(0, (4, -1)).mean(dim=1)  # 2 segments of 2 time steps
    torch.testing.assert_close(features.steps_NVPCD[0, 0, :, 0], steps_PD)
    pooled_F = features.pooled("clip")[0, 0]
    torch.testing.assert_close(pooled_F, tokens_ND.mean(dim=0), atol=1e-5, rtol=1e-5)


def test_pooling_over_time_cannot_tell_order_and_joined_steps_can(squares, tmp_path):
    features = _extract(ssv2_task(squares), tmp_path, "validation", num_views=3)
    reverse = replace(features, steps_NVPCD=features.steps_NVPCD.flip(2))
    torch.testing.assert_close(features.pooled("clip"), reverse.pooled("clip"))
    assert not torch.allclose(features.pooled("time"), reverse.pooled("time"))
    assert features.pooled("time").shape == (6, 3, 4 * 48)


def test_cells_keep_the_places_that_their_mean_forgets(squares, tmp_path):
    task = ssv2_task(squares)
    task = task.model_copy(update={"clip": task.clip.model_copy(update={"cells": 2})})
    features = _extract(task, tmp_path, "validation", num_views=3)
    tokens_ND = _tokens(features)[0, 0]
    side = round((tokens_ND.shape[0] // 4) ** 0.5)
    places = tokens_ND.unflatten(0, (4, side, side))
    half = side // 2
    lower_left = places[:, half:, :half].mean(dim=(1, 2))  # cell 2 of 0 … 3, row by row
    found = features.steps_NVPCD[0, 0, :, 2]
    torch.testing.assert_close(found, lower_left, atol=1e-2, rtol=1e-2)
    assert features.pooled("cells").shape == (6, 3, 4 * 4 * 48)
    steps = features.steps_NVPCD.mean(dim=3).flatten(2)
    torch.testing.assert_close(features.pooled("time"), steps)


_WAYS = (
    ("time", "time", "forward"),
    ("clip", "clip", "forward"),
    ("shuffled", "time", "shuffled"),
)


def test_place_in_the_tokens_tells_directions_apart_only_with_steps_kept_and_in_order(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=36, validation=24)
    sweep = {"learning_rates": (0.03,), "weight_decays": (1e-3,), "epochs": 60, "batch": 8}
    found = {}
    for name, pooling, order in _WAYS:
        linear = LinearConfig(pooling=pooling, **sweep)
        clip = ClipConfig(frames=12, fps=8.0, resolution=32, views=1, frame_order=order)
        task = ssv2_task(folder, clip=clip, linear=linear)
        encoder = freeze(_SeesPlace(tiny_encoder().config, attention=AttentionConfig()), task)
        request = replace(_request(task, tmp_path), heads=("linear",))
        (record,) = evaluate(encoder, read_task(task), request, report=lambda _: None)
        found[name] = record.top1
    assert found["time"] >= 0.9
    # Still or moving is all that is left to tell: two thirds, and half of the pair by luck.
    assert found["clip"] <= 0.7
    assert found["shuffled"] <= 0.85


def test_several_layers_are_joined(squares, tmp_path):
    clip = ClipConfig(frames=4, fps=4.0, resolution=32, layers=(0, 1))
    features = _extract(ssv2_task(squares, clip=clip), tmp_path, "train", num_views=1)
    last = ClipConfig(frames=4, fps=4.0, resolution=32)
    only_last = _extract(ssv2_task(squares, clip=last), tmp_path, "train", num_views=1)
    half = _tokens(only_last).shape[2]
    assert _tokens(features).shape[2] == 2 * half
    assert torch.equal(_tokens(features)[:, :, half:], _tokens(only_last))


def test_a_second_call_reads_the_cache_and_scores_the_same(squares, tmp_path):
    task = ssv2_task(squares)
    first = _scores(task, tmp_path)
    entries = sorted((tmp_path / "cache").iterdir())
    written = {path: (path / "chunk-00000.safetensors").stat().st_mtime_ns for path in entries}
    assert _scores(task, tmp_path) == first
    assert {
        path: (path / "chunk-00000.safetensors").stat().st_mtime_ns for path in entries
    } == written
    assert _scores(task, tmp_path / "elsewhere") == first


def test_features_belong_to_encoder_clip_and_videos(squares, tmp_path):
    task = ssv2_task(squares)
    keys = {
        "same": _asked(task).key(),
        "other weights": _asked(task, seed=1).key(),
        "other clip": _asked(
            ssv2_task(squares, clip=ClipConfig(frames=4, fps=2.0, resolution=32))
        ).key(),
        "fewer videos": _asked(ssv2_task(squares, max_train=6)).key(),
    }
    assert len(set(keys.values())) == 4
    # What only heads depend on does not encode again.
    assert _asked(ssv2_task(squares, selection="validation")).key() == keys["same"]
    assert _asked(task).key() == keys["same"]


@pytest.mark.parametrize("damage", ["content", "record", "cut"])
def test_only_the_damaged_piece_of_a_cache_is_encoded_again(squares, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(chunks, "_MOST_ROWS", 5)
    asked = _asked(ssv2_task(squares))
    first = extract(asked, tmp_path, _silent)
    whole = _tokens(first)
    folder = tmp_path / asked.key()
    path = folder / "chunk-00001.safetensors"
    if damage == "content":
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    elif damage == "cut":
        path.write_bytes(b"")
    else:
        path.with_suffix(".json").write_text("{}")
    others = {p: p.stat().st_mtime_ns for p in folder.glob("chunk-*.safetensors") if p != path}
    assert len(others) == 2
    again = extract(asked, tmp_path, _silent)
    assert not again.from_cache
    assert torch.equal(_tokens(again), whole)
    assert torch.equal(again.steps_NVPCD, first.steps_NVPCD)
    assert {p: p.stat().st_mtime_ns for p in others} == others
    assert extract(asked, tmp_path, _silent).from_cache


def test_pruning_removes_what_was_used_longest_ago(squares, tmp_path):
    tasks = [ssv2_task(squares, max_train=n) for n in (6, 9)]
    for task in tasks:
        extract(_asked(task), tmp_path, _silent)
    one = sum(f.stat().st_size for f in (tmp_path / _asked(tasks[1]).key()).iterdir()) / 2**30
    prune(tmp_path, 1.5 * one)
    assert [path.name for path in tmp_path.iterdir()] == [_asked(tasks[1]).key()]


def test_pruning_leaves_what_another_process_uses(squares, tmp_path):
    asked = _asked(ssv2_task(squares, max_train=6))
    features = extract(asked, tmp_path, _silent)
    prune(tmp_path, 0.0)
    assert (tmp_path / asked.key()).is_dir()
    features.held.close()
    prune(tmp_path, 0.0)
    assert not (tmp_path / asked.key()).exists()


def test_undecodable_videos_are_named_left_out_and_counted(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=8, validation=4)
    (folder / "videos" / "3.mp4").write_bytes(b"")
    task = ssv2_task(folder, max_bad_share=0.2)
    features = _extract(task, tmp_path, "train", num_views=1)
    assert [(fault.position, fault.key) for fault in features.faults] == [(2, "3")]
    assert features.faults[0].reason.startswith("empty")
    assert features.labels_N.tolist() == [1, 2, 1, 2, 0, 1, 2]
    assert _extract(task, tmp_path, "train", num_views=1).faults == features.faults
    records = _records(task, tmp_path)
    assert {record.num_faults["train"] for record in records} == {1}
    assert {record.num_train for record in records} == {7}


def test_more_bad_videos_than_tolerated_stop_the_probe(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=8, validation=4)
    for key in (2, 3):
        (folder / "videos" / f"{key}.mp4").write_bytes(b"no video at all")
    with pytest.raises(DataError, match=r"2 of the 8 train videos.*1 are tolerated.*2: "):
        _extract(ssv2_task(folder, max_bad_share=0.2), tmp_path, "train", num_views=1)


@pytest.mark.parametrize("live", [{"token_cache_gib": 0.0}, {"tokens": "encode"}])
def test_tokens_encoded_in_every_epoch_give_the_scores_of_those_on_disk(squares, tmp_path, live):
    kept = _scores(ssv2_task(squares), tmp_path / "kept")
    found = _scores(ssv2_task(squares, **live), tmp_path / "live")
    # Both are rounded to bf16, so even the losses agree.
    assert [s[:3] for s in found] == [s[:3] for s in kept]
    for one, other in zip(found, kept, strict=True):
        for point, same in zip(one[3], other[3], strict=True):
            assert point == pytest.approx(same, abs=1e-3)
    assert _token_files(tmp_path / "kept")
    assert not _token_files(tmp_path / "live")


def test_augmentation_is_a_function_of_epoch_and_video_and_off_for_scoring(squares):
    augmentation = Augmentation(
        random_crop=True, random_time=True, rand_augment=RandAugment(), erase=1.0
    )
    task = ssv2_task(squares, augmentation=augmentation)
    split = read_task(task).train
    reader, again = (
        ClipReader(split, task.clip, num_views=1, augmentation=augmentation) for _ in range(2)
    )
    first = reader.read(3, epoch=0).video_VSCTHW
    assert torch.equal(first, again.read(3, epoch=0).video_VSCTHW)
    assert not torch.equal(first, reader.read(3, epoch=1).video_VSCTHW)
    plain = ClipReader(split, task.clip, num_views=1, augmentation=Augmentation())
    assert torch.equal(reader.read(3).video_VSCTHW, plain.read(3).video_VSCTHW)


def test_live_batches_keep_order_and_labels_whatever_the_threads(squares):
    encoder = freeze(tiny_encoder(), ssv2_task(squares))
    order = torch.tensor([5, 0, 7, 2, 9])
    found = []
    for threads in (1, 3):
        task = ssv2_task(squares, decode_threads=threads, encode_batch=2)
        split = read_task(task).train
        live = LiveInputs(encoder, split, task, num_views=1)
        batches = list(live.batches(order, 3, epoch=None))
        assert [len(batch.labels_B) for batch in batches] == [3, 2]
        assert torch.cat([b.labels_B for b in batches]).tolist() == [
            split.videos[i].label for i in order
        ]
        found.append(torch.cat([batch.inputs_BV for batch in batches]))
    torch.testing.assert_close(found[0], found[1])


def test_three_views_are_both_ends_and_the_centre_at_one_scale(tmp_path):
    folder = write_ssv2(tmp_path / "set", train=3, validation=1)
    wide = np.concatenate([moving_square(2, seed=s, size=32) for s in (1, 2)], axis=2)
    (folder / "videos" / "1.mp4").write_bytes(encode_h264(wide, 8))
    task = ssv2_task(folder)
    reader = ClipReader(read_task(task).train, task.clip, num_views=3, augmentation=Augmentation())
    views = reader.read(0).video_VSCTHW[:, 0].float()
    shown = (
        torch.from_numpy(
            decode_frames(
                (folder / "videos" / "1.mp4").read_bytes(), np.zeros(1), DecodeLimits()
            ).frames_THWC[0]
        )
        .permute(2, 0, 1)
        .float()
    )
    for view, left in zip(views, (0, 16, 32), strict=True):
        assert (view[:, 0] - shown[..., left : left + 32]).abs().max() <= 1


def test_attention_heads_that_do_not_divide_the_width_are_refused_with_the_nearest(
    squares, tmp_path
):
    task = ssv2_task(squares)
    wrong = task.model_copy(
        update={"attentive": task.attentive.model_copy(update={"attention_heads": 7})}
    )
    with pytest.raises(ConfigError, match=r"width 48, got 7; the nearest that does is 6"):
        _records(wrong, tmp_path)


def test_records_state_what_they_rest_on(squares, tmp_path):
    attentive, linear, knn = _records(ssv2_task(squares), tmp_path)
    assert (attentive.head, linear.head, knn.head) == ("attentive", "linear", "knn")
    assert attentive.chance == pytest.approx(1 / 3)
    assert (attentive.num_train, attentive.num_val, attentive.num_classes) == (12, 6, 3)
    assert attentive.top5 is None
    assert [point["epoch"] for point in attentive.curve] == [1, 2]
    assert len(attentive.sweep) == 2
    assert json.dumps(attentive.task_config)
    assert knn.curve == []


def test_wilson_interval_equals_textbook_values():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)


class _SeesPlace(Encoder):
    """Tokens that hold a patch's brightness, and brightness times its column."""

    def forward(self, video_BCTHW, keep_BK=None, layers=()):  # noqa: ARG002
        patches = avg_pool3d(video_BCTHW.mean(dim=1, keepdim=True), (2, 8, 8))  # [B, 1, t, h, w]
        bright = patches - patches.amin(dim=(2, 3, 4), keepdim=True)
        column = torch.arange(patches.shape[-1]) - (patches.shape[-1] - 1) / 2
        tokens = torch.cat([bright, bright * column, torch.zeros_like(bright)], dim=1)
        return torch.nn.functional.pad(tokens.flatten(2).transpose(1, 2), (0, 45))


def _asked(task, split="train", *, num_views=1, seed=0):
    return Extraction(
        encoder=freeze(tiny_encoder(seed), task),
        split=getattr(read_task(task), split),
        task=task,
        num_views=num_views,
        keep_tokens=True,
    )


def _extract(task, cache, split, *, num_views):
    return extract(_asked(task, split, num_views=num_views), cache, _silent)


def _tokens(features):
    return features.tokens.rows(torch.arange(len(features.labels_N))).float()


def _token_files(folder):
    found = []
    for path in folder.rglob("chunk-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found += ["tokens"] if "tokens" in file.keys() else []  # noqa: SIM118
    return found


def _records(task, out):
    encoder = freeze(tiny_encoder(), task)
    return evaluate(encoder, read_task(task), _request(task, out), report=lambda _: None)


def _request(task, out):
    return ProbeRequest(
        source=out,
        step=0,
        which="teacher",
        task=task,
        heads=("attentive", "linear", "knn"),
        seeds=(0,),
        out=out,
    )


def _scores(task, out):
    return [(r.head, r.seed, r.top1, r.curve[-1:]) for r in _records(task, out)]


def _silent(done: int, total: int) -> None:
    pass
