"""Shared memory is used again, but never while anything still refers to what lies in it."""

import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.data.blocks import BlockPlace, Returns, Sent, SharedMemory
from pipeline.data.loader import Loader, make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.masks.collate import collate_plan
from tests.shards import make_plans, write_dataset

NUM_MICRO_BATCHES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shards") / "set", 6)


def start(folder: Path, workers: int = 1) -> Loader:
    config = DataConfig(sources=(Source(path=str(folder)),), workers=workers, prefetch=1)
    collate = partial(collate_plan, seed=4)
    return make_loader(config, plans=make_plans(), collate=collate, seed=4)


def digest(video: torch.Tensor) -> str:
    return hashlib.sha256(video.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(folder) -> list[str]:
    with start(folder, workers=0) as loader:
        return [digest(batch.video_BCTHW) for batch in loader]


def test_blocks_are_used_again_and_micro_batches_stay_right(folder, expected):
    with start(folder) as loader:
        found, lent = [], []
        for batch in loader:
            found.append(digest(batch.video_BCTHW))
            lent.append(len(loader._crew._returns._lent))
            del batch
    assert found == expected
    # Every one lay in one of the three blocks, and its predecessor's was free again.
    assert lent == [1] * NUM_MICRO_BATCHES


def test_what_is_still_referred_to_is_never_overwritten(folder, expected):
    with start(folder) as loader:
        # Views alone, as an objective might keep: the micro-batches themselves are gone.
        views = [batch.video_BCTHW[:, :, 1:] for batch in loader]
    with start(folder, workers=0) as loader:
        for view, batch in zip(views, loader, strict=True):
            assert torch.equal(view, batch.video_BCTHW[:, :, 1:])


def test_a_block_comes_back_when_the_last_view_is_gone(folder):
    flags = SharedMemory.make(1, 2).blocks.in_use_WN
    returns = Returns(flags)
    with start(folder, workers=0) as loader:
        batch = next(loader)
    flags[0, 1] = 1
    received = returns.receive(Sent(batch=batch, place=BlockPlace(worker=0, number=1)))
    view = received.video_BCTHW[0]
    del batch, received
    returns.collect()
    assert flags.tolist() == [[0, 1]]
    del view
    returns.collect()
    assert flags.tolist() == [[0, 0]]


def test_a_block_comes_back_at_once_when_its_video_was_copied_to_pinned_memory(folder):
    flags = SharedMemory.make(1, 1).blocks.in_use_WN
    flags[0, 0] = 1
    with start(folder, workers=0) as loader:
        batch = next(loader)
    Returns(flags).receive(Sent(batch=batch, place=BlockPlace(worker=0, number=0), copied=True))
    assert flags.tolist() == [[0]]


def test_outside_a_worker_memory_is_private():
    block = SharedMemory.make(1, 1).blocks.take((1, 2, 4, 4, 3))
    assert block.place is None
    assert not block.video_BTHWC.is_shared()


def test_micro_batches_arrive_without_a_further_copy(folder):
    with start(folder) as loader:
        batch = next(loader)
        # Channels last, as cropping leaves them, and in the block that the worker filled.
        assert batch.video_BCTHW.permute(0, 2, 3, 4, 1).is_contiguous()
        assert batch.video_BCTHW.is_shared()
