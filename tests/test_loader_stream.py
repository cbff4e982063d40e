"""The same positions give the same clips, crops and masks at any world size and worker count."""

import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.clip import ClipBatch
from pipeline.data.augment import CropSpec, crop, random_box
from pipeline.data.clips import open_sources
from pipeline.data.decode import decode_frames
from pipeline.data.loader import make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.errors import UsageError
from pipeline.masks.collate import collate_plan
from tests.shards import FPS, GLOBAL_BATCH, make_plans, write_dataset

SEED = 11


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, ...]:
    folder = tmp_path_factory.mktemp("shards")
    large = write_dataset(folder / "large", 20)
    small = write_dataset(folder / "small", 5, first_seed=100)
    return Source(path=str(large), weight=0.75), Source(path=str(small), weight=0.25)


def fingerprint(batch: ClipBatch) -> tuple[str, ...]:
    """Everything that training sees of a micro-batch, one entry per clip."""
    prints = []
    for row in range(len(batch.keys)):
        digest = hashlib.sha256(batch.video_BCTHW[row].numpy().tobytes())
        digest.update(batch.times_BT[row].numpy().tobytes())
        for mask in batch.masks:
            digest.update(mask.context_BK[row].numpy().tobytes())
            digest.update(mask.target_BK[row].numpy().tobytes())
        prints.append(f"{batch.step} {batch.refs[row]} {batch.keys[row]} {digest.hexdigest()}")
    return tuple(prints)


def load(sources: tuple[Source, ...], workers: int, **plans: int) -> list[ClipBatch]:
    config = DataConfig(sources=sources, workers=workers, prefetch=1)
    collate = partial(collate_plan, seed=SEED)
    loader = make_loader(config, plans=make_plans(**plans), collate=collate, seed=SEED)
    with loader:
        return list(loader)


def by_position(batches: list[ClipBatch]) -> dict[int, str]:
    rows = [row for batch in batches for row in fingerprint(batch)]
    positions = [ref.position for batch in batches for ref in batch.refs]
    assert len(set(positions)) == len(positions)
    return dict(zip(positions, rows, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(sources) -> dict[int, str]:
    """World of one, no worker: what every other setting has to equal."""
    return by_position(load(sources, workers=0))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_clips_crops_and_masks_are_the_same_at_any_world_size_and_worker_count(
    sources, uninterrupted, world_size, workers
):
    rows: dict[int, str] = {}
    for rank in range(world_size):
        batches = load(sources, workers, rank=rank, world_size=world_size)
        assert [batch.step for batch in batches] == sorted(batch.step for batch in batches)
        rows |= by_position(batches)
    assert rows == uninterrupted
    assert sorted(rows) == list(range(6 * GLOBAL_BATCH))


@pytest.mark.parametrize("first_step", [2, 4, 6])
def test_a_resume_goes_on_with_the_same_micro_batches(sources, uninterrupted, first_step):
    # Step 4 is the first of the second stage.
    rows = by_position(load(sources, workers=2, first_step=first_step))
    begin = (first_step - 1) * GLOBAL_BATCH
    assert rows == {p: row for p, row in uninterrupted.items() if p >= begin}


def test_workers_pass_a_stage_border_without_a_restart(sources):
    batches = load(sources, workers=2, first_step=3, last_step=4)
    shapes = [tuple(batch.video_BCTHW.shape) for batch in batches]
    assert shapes == [(2, 3, 4, 32, 32)] * 4 + [(2, 3, 8, 48, 48)] * 4
    assert [batch.stage for batch in batches] == [0] * 4 + [1] * 4
    assert all(batch.video_BCTHW.dtype == torch.uint8 for batch in batches)


def test_another_seed_gives_other_clips(sources, uninterrupted):
    config = DataConfig(sources=sources, workers=0)
    plans = make_plans(last_step=1)
    collate = partial(collate_plan, seed=12)
    with make_loader(config, plans=plans, collate=collate, seed=12) as loader:
        others = by_position(list(loader))
    assert not set(others.values()) & set(uninterrupted.values())


def test_a_clip_shows_the_frames_on_display_at_evenly_spaced_times(sources):
    for batch in load(sources, workers=0, last_step=3):
        for times, ref in zip(batch.times_BT, batch.refs, strict=True):
            frames = times * FPS
            torch.testing.assert_close(frames, frames.round(), atol=1e-3, rtol=0.0)
            if ref.source == 0:
                assert set(frames.round().diff().int().tolist()) <= {2}


def test_plans_may_be_a_function_that_every_worker_calls(sources, uninterrupted):
    config = DataConfig(sources=sources, workers=2)
    collate = partial(collate_plan, seed=SEED)
    plans = partial(make_plans, last_step=2)
    with make_loader(config, plans=plans, collate=collate, seed=SEED) as loader:
        rows = by_position(list(loader))
    assert rows == {p: row for p, row in uninterrupted.items() if p < 2 * GLOBAL_BATCH}


def test_reference_sampling_takes_other_frames_than_even_spacing(sources):
    collate = partial(collate_plan, seed=SEED)
    times = []
    for sampling in ("time", "reference"):
        config = DataConfig(sources=sources[:1], workers=0, sampling=sampling)
        plans = make_plans(first_step=4, last_step=4)
        with make_loader(config, plans=plans, collate=collate, seed=SEED) as loader:
            times.append(torch.cat([batch.times_BT for batch in loader]))
    assert not torch.equal(*times)
    # The reference spreads T frames over T strides, ends included: longer steps now and then.
    assert times[1].diff(dim=1).max() > times[0].diff(dim=1).max()


def test_a_folder_without_a_dataset_is_refused(tmp_path: Path):
    config = DataConfig(sources=(Source(path=str(tmp_path)),))
    with pytest.raises(UsageError):
        open_sources(config)


def test_ranges_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match="crop_scale"):
        DataConfig(sources=(Source(path="x"),), crop_scale=(1.0, 0.3))
    with pytest.raises(ValueError, match="crop_aspect_ratio"):
        DataConfig(sources=(Source(path="x"),), crop_aspect_ratio=(1.0, 0.3))


def test_a_clip_is_the_crop_of_whole_frames_at_its_times(sources):
    config = DataConfig(sources=sources, workers=0)
    datasets = open_sources(config)
    spec = CropSpec(scale=(0.3, 1.0), aspect_ratio=(0.75, 1.35), horizontal_flip=0.5)
    for batch in load(sources, workers=0, first_step=4, last_step=4):
        for ref, times, video in zip(batch.refs, batch.times_BT, batch.video_BCTHW, strict=True):
            dataset = datasets[ref.source]
            payload = dataset.read_member(dataset.record(ref.sample))
            whole = decode_frames(payload, times.numpy(), config.decode).frames_THWC
            size = {"height": whole.shape[1], "width": whole.shape[2]}
            box = random_box(spec, seed=SEED, position=ref.position, **size)
            assert torch.equal(video, crop(whole, box, 48, antialias=False))
