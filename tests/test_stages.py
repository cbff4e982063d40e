"""Every position of a run is planned exactly once, the same at any world size."""

import pickle

import pytest
from pydantic import ValidationError

from pipeline.clip import Grid
from pipeline.errors import ConfigError
from pipeline.masks.blocks import BlockMask, MaskConfig, StageMasks
from pipeline.schedule import LearningRate
from pipeline.stages import (
    Share,
    Stage,
    accumulation,
    micro_batch_plans,
    place_of_step,
    total_steps,
)

CONSTANT = LearningRate(shape="constant", peak=1e-3)


def _stage(name: str, steps: int, micro_batch: int, frames: int = 4, **values) -> Stage:
    size = {"frames": frames, "fps": 4.0, "resolution": 32 * len(name)}
    return Stage(
        name=name, steps=steps, micro_batch=micro_batch, learning_rate=CONSTANT, **size, **values
    )


def _grid(frames: int, resolution: int) -> Grid:
    return Grid(t=frames // 2, h=resolution // 16, w=resolution // 16)


STAGES = (_stage("a", 3, 4), _stage("bb", 1, 2, frames=8), _stage("ccc", 5, 1, frames=16))


def _plans(rank: int, world_size: int, first: int = 1, last: int = 9, stages=STAGES):
    share = Share(global_batch=8, rank=rank, world_size=world_size)
    return list(micro_batch_plans(stages, share, first, last, MaskConfig(), _grid))


def test_each_step_belongs_to_one_stage_with_its_own_count():
    places = [place_of_step(STAGES, step) for step in range(1, total_steps(STAGES) + 1)]
    assert [place.index for place in places] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert [place.step_in_stage for place in places] == [1, 2, 3, 1, 1, 2, 3, 4, 5]
    assert places[3].stage is STAGES[1]


@pytest.mark.parametrize("step", [0, -3, 10])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match=rf"step {step} is not one of the run's 1 … 9"):
        place_of_step(STAGES, step)


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_together_cover_every_position_once_in_order(world_size):
    positions = []
    for step in range(1, 10):
        for rank in range(world_size):
            for plan in _plans(rank, world_size, step, step):
                assert plan.step == step
                positions += plan.positions
    assert positions == list(range(9 * 8))


def test_micro_batches_are_the_same_at_every_world_size():
    stages = (_stage("a", 2, 1), _stage("bb", 2, 2))
    alone = {_identity(plan) for plan in _plans(0, 1, 1, 4, stages)}
    for world_size in (2, 4):
        ranks = [_plans(rank, world_size, 1, 4, stages) for rank in range(world_size)]
        assert {_identity(plan) for plans in ranks for plan in plans} == alone
        assert len({len(plans) for plans in ranks}) == 1


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5, 6, 9])
def test_a_resume_in_a_stage_or_at_its_border_plans_the_rest_of_the_run(first):
    whole = _plans(1, 2)
    assert _plans(1, 2, first) == [plan for plan in whole if plan.step >= first]


def test_a_plan_carries_its_stage_size_masks_and_grid():
    own = (BlockMask(num_blocks=1, spatial_scale=(0.5, 0.5)),)
    stages = (STAGES[0], _stage("bb", 2, 4, frames=8, masks=StageMasks(blocks=own)))
    first, second = _plans(0, 2, 3, 4, stages)
    assert (first.stage, first.frames, first.resolution, first.size) == (0, 4, 32, 4)
    assert (first.masks, first.grid) == (MaskConfig(), Grid(t=2, h=2, w=2))
    assert (second.stage, second.frames, second.resolution, second.fps) == (1, 8, 64, 4.0)
    assert (second.masks, second.grid) == (MaskConfig(blocks=own), Grid(t=4, h=4, w=4))
    assert second.first_position == 3 * 8


def test_plans_travel_to_worker_processes():
    plan = _plans(0, 1, 4, 4)[0]
    assert pickle.loads(pickle.dumps(plan)) == plan  # noqa: S301 - our own bytes


@pytest.mark.parametrize(
    ("micro_batch", "global_batch", "world_size", "expected"),
    [(24, 3072, 128, 1), (12, 3072, 256, 1), (6, 3072, 512, 1), (24, 3072, 8, 16), (1, 7, 7, 1)],
)
def test_accumulation_completes_the_global_batch(micro_batch, global_batch, world_size, expected):
    assert accumulation(_stage("a", 1, micro_batch), global_batch, world_size) == expected


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "remedy"),
    [
        (24, 80, "Use 64 or 128 processes, or global_batch 1920 or 3840."),
        (20, 8, "Use micro_batch 16 or 24, or global_batch 3040 or 3200."),
        (24, 96, "Use micro_batch 16 or 32, or 64 or 128 processes, or global_batch 2304 or 4608."),
        (24, 256, "Use micro_batch 12, or 128 processes, or global_batch 6144."),
    ],
)
def test_a_global_batch_that_does_not_divide_names_the_nearest_that_do(
    micro_batch, world_size, remedy
):
    with pytest.raises(ConfigError, match="stage pretrain: global_batch 3072 is not") as caught:
        accumulation(_stage("pretrain", 1, micro_batch), 3072, world_size)
    assert caught.value.remedy == remedy


def test_a_curve_that_does_not_fit_its_stage_is_refused_with_the_stage():
    rate = LearningRate(shape="constant", start=1e-4, peak=1e-3, warmup_steps=11)
    with pytest.raises(ValidationError, match="warmup_steps is 11, more than the stage's 10 steps"):
        Stage(
            name="a", steps=10, frames=4, fps=4.0, resolution=32, micro_batch=1, learning_rate=rate
        )


def _identity(plan) -> tuple:
    return (plan.step, plan.stage, plan.first_position, plan.size, plan.frames, plan.resolution)
