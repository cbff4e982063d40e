"""Bad samples are replaced, named and counted, and never shift the others."""

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.clip import ClipBatch
from pipeline.data.format import ShardIndex
from pipeline.data.layout import Member
from pipeline.data.loader import make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.errors import DataError, StorageError
from pipeline.masks.collate import collate_plan
from tests.shards import make_plans, render_video, write_dataset

NUM_SAMPLES = 12


def broken_video(number: int) -> dict[str, bytes]:
    if number == 3:
        return {"mp4": b"not a video at all" * 50}
    if number == 7:
        return {"mp4": render_video(7, 12)[:900]}
    return {}


def load(folder: Path, workers: int = 0, **settings) -> list[ClipBatch]:
    config = DataConfig(sources=(Source(path=str(folder)),), workers=workers, **settings)
    collate = partial(collate_plan, seed=2)
    with make_loader(config, plans=make_plans(), collate=collate, seed=2) as loader:
        return list(loader)


def clips(batches: list[ClipBatch]) -> dict[int, tuple[str, int, bytes]]:
    return {
        ref.position: (key, ref.attempt, video.numpy().tobytes())
        for batch in batches
        for ref, key, video in zip(batch.refs, batch.keys, batch.video_BCTHW, strict=True)
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("good") / "set", NUM_SAMPLES)


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("bad") / "set", NUM_SAMPLES, extra=broken_video)


def test_a_bad_sample_is_replaced_without_moving_any_other(good, bad):
    expected, found = clips(load(good)), clips(load(bad))
    bad_keys = {"clip-00003", "clip-00007"}
    replaced = {p for p, (key, _, _) in expected.items() if key in bad_keys}
    assert len(replaced) >= 4
    for position, clip in found.items():
        if position in replaced:
            assert clip[1] >= 1
            assert clip[0] not in bad_keys
        else:
            assert clip == expected[position]


def test_substitutes_are_the_same_at_any_worker_count_and_in_every_run(bad):
    alone = clips(load(bad))
    assert clips(load(bad)) == alone
    assert clips(load(bad, workers=2)) == alone


def test_faults_name_the_sample_its_place_and_the_reason(bad):
    faults = [fault for batch in load(bad, workers=1) for fault in batch.faults]
    assert {fault.key for fault in faults} == {"clip-00003", "clip-00007"}
    for fault in faults:
        assert fault.dataset == str(bad)
        # Samples 3 and 7 lie in the second shard.
        assert fault.shard == "shard-000001.tar"
        assert fault.reason
        assert 0 <= fault.position < 48


def test_a_flipped_bit_in_a_shard_is_a_fault_and_not_a_different_picture(good, tmp_path):
    folder = write_dataset(tmp_path / "set", NUM_SAMPLES)
    index = ShardIndex.open(folder)
    record = next(r for r in map(index.record, range(NUM_SAMPLES)) if r.key == "clip-00004")
    place = record.place(Member.VIDEO)
    with index.shard_path(record).open("r+b") as file:
        file.seek(place.offset + place.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    batches = load(folder)
    faults = [fault for batch in batches for fault in batch.faults]
    assert {fault.key for fault in faults} == {"clip-00004"}
    assert all("checksum" in fault.reason for fault in faults)
    assert "clip-00004" not in {key for key, _, _ in clips(batches).values()}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_run_stops_once_the_budget_of_bad_samples_is_spent(bad, workers):
    with pytest.raises(DataError, match=r"3 bad samples in \d+ clips, allowed are 2") as caught:
        load(bad, workers=workers, max_bad_samples=2, max_bad_fraction=0.0)
    assert "clip-0000" in str(caught.value)
    assert "max_bad_fraction" in caught.value.remedy


def test_a_share_of_bad_samples_below_the_limit_is_tolerated(bad):
    batches = load(bad, max_bad_samples=2, max_bad_fraction=0.5)
    assert sum(len(batch.faults) for batch in batches) > 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_stops_if_substitutes_are_bad_as_well(tmp_path, workers):
    folder = write_dataset(tmp_path / "set", 4, extra=lambda _: {"mp4": b"rubbish" * 100})
    with pytest.raises(DataError, match="position 0: a sample and 2 substitutes") as caught:
        load(folder, workers=workers, max_substitutes=2)
    # From a worker, too, it is the error itself and not the text of a traceback.
    assert "Traceback" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_shard_that_vanished_is_an_error_and_not_a_bad_sample(tmp_path):
    folder = write_dataset(tmp_path / "set", NUM_SAMPLES)
    config = DataConfig(sources=(Source(path=str(folder)),), workers=0)
    collate = partial(collate_plan, seed=2)
    with make_loader(config, plans=make_plans(), collate=collate, seed=2) as loader:
        (folder / "shard-000001.tar").unlink()
        with pytest.raises(StorageError, match=r"shard-000001\.tar"):
            list(loader)


def companions(number: int) -> dict[str, bytes]:
    arrays = {"times.npy": np.arange(30) / 8.0}
    arrays["states.npy"] = np.stack([np.arange(30), np.full(30, number)], 1).astype("<f4")
    arrays["actions.npy"] = np.arange(29, dtype="<f4")[:, None]
    members = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
        members[name] = buffer.getvalue()
    captions = [{"t0": 0.0, "t1": 9.0, "text": f"sample {number}"}]
    return members | {"captions.json": json.dumps(captions).encode()}


def test_captions_states_and_actions_belong_to_the_frames_of_their_clip(tmp_path):
    folder = write_dataset(tmp_path / "set", NUM_SAMPLES, extra=companions)
    for batch in load(folder, companions=("captions", "states", "actions")):
        rows = (batch.times_BT * 8).round()
        torch.testing.assert_close(batch.states_BTS[..., 0].double(), rows)
        torch.testing.assert_close(batch.actions_BTA[..., 0].double(), rows[:, :-1])
        numbers = [int(key.removeprefix("clip-")) for key in batch.keys]
        assert batch.text == tuple(f"sample {number}" for number in numbers)
        assert batch.states_BTS[:, 0, 1].tolist() == numbers


def test_what_a_run_does_not_ask_for_is_not_read(tmp_path):
    folder = write_dataset(tmp_path / "set", 4, extra=companions)
    batch = load(folder)[0]
    assert batch.text is None
    assert batch.states_BTS is None
    assert batch.actions_BTA is None


def test_a_sample_without_states_is_replaced_where_states_are_needed(tmp_path):
    def some(number: int) -> dict[str, bytes]:
        return companions(number) if number != 2 else {}

    folder = write_dataset(tmp_path / "set", NUM_SAMPLES, extra=some)
    faults = [f for batch in load(folder, companions=("states",)) for f in batch.faults]
    assert {fault.key for fault in faults} == {"clip-00002"}
    assert all("missing member" in fault.reason for fault in faults)
