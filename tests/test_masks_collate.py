"""A micro-batch is its clips in order, with masks drawn by position."""

import pickle

import pytest
import torch

from pipeline.clip import Clip, ClipRef, Grid, MicroBatchPlan, SampleFault
from pipeline.data.blocks import Sent
from pipeline.errors import DataError
from pipeline.masks.blocks import REFERENCE_MASKS, MaskConfig
from pipeline.masks.collate import collate, collate_plan
from pipeline.masks.sample import sample_masks

torch.set_num_threads(1)

GRID = Grid(t=2, h=4, w=4)
MASKS = MaskConfig()


def _clip(position: int, **values) -> Clip:
    fill = torch.full((3, 4, 64, 64), position, dtype=torch.uint8)
    times = torch.arange(4, dtype=torch.float64) + position
    ref = ClipRef(position=position, source=0, sample=position, epoch=0)
    return Clip(ref=ref, key=f"clip-{position}", **{"video_CTHW": fill, "times": times, **values})


def _collate(clips: list[Clip], masks=MASKS):
    return collate(clips, step=3, stage=1, grid=GRID, masks=masks, seed=5)


def test_clips_are_stacked_in_order_with_their_dtypes():
    batch = _collate([_clip(10), _clip(11), _clip(12)])
    assert batch.video_BCTHW.shape == (3, 3, 4, 64, 64)
    assert batch.video_BCTHW.dtype == torch.uint8
    assert batch.video_BCTHW[:, 0, 0, 0, 0].tolist() == [10, 11, 12]
    assert batch.times_BT.dtype == torch.float64
    assert batch.times_BT[:, 0].tolist() == [10.0, 11.0, 12.0]
    assert batch.keys == ("clip-10", "clip-11", "clip-12")
    assert [ref.position for ref in batch.refs] == [10, 11, 12]
    assert (batch.step, batch.stage, batch.first_position, batch.grid) == (3, 1, 10, GRID)


def test_masks_are_those_of_the_positions():
    batch = _collate([_clip(10), _clip(11)])
    for ours, drawn in zip(batch.masks, sample_masks(MASKS, GRID, 5, [10, 11]), strict=True):
        assert torch.equal(ours.context_BK, drawn.context_BK)
        assert torch.equal(ours.target_BK, drawn.target_BK)


def test_an_objective_without_masks_gets_none():
    assert _collate([_clip(0)], masks=MaskConfig(blocks=())).masks == ()


def test_text_of_some_clips_is_kept_with_none_for_the_others():
    assert _collate([_clip(0, text="a dog"), _clip(1)]).text == ("a dog", None)
    assert _collate([_clip(0), _clip(1)]).text is None


def test_states_and_actions_are_there_only_if_every_clip_has_them():
    with_both = {"states": torch.ones(4, 7), "actions": torch.zeros(4, 2)}
    full = _collate([_clip(0, **with_both), _clip(1, **with_both)])
    assert full.states_BTS is not None
    assert full.actions_BTA is not None
    assert full.states_BTS.shape == (2, 4, 7)
    assert full.actions_BTA.shape == (2, 4, 2)
    part = _collate([_clip(0, **with_both), _clip(1)])
    assert part.states_BTS is None
    assert part.actions_BTA is None


def test_faults_of_all_clips_are_gathered_in_order():
    faults = [
        SampleFault(position=p, dataset="ssv2", shard="s", key=f"k{p}", reason="no video stream")
        for p in range(3)
    ]
    batch = _collate(
        [_clip(0, faults=(faults[0], faults[1])), _clip(1), _clip(2, faults=(faults[2],))]
    )
    assert batch.faults == tuple(faults)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("video", {"video_CTHW": torch.zeros(3, 4, 48, 64, dtype=torch.uint8)}),
        ("times", {"times": torch.zeros(5, dtype=torch.float64)}),
        ("states", {"states": torch.ones(4, 6)}),
    ],
)
def test_clips_of_unequal_shape_are_named(name, values):
    with pytest.raises(DataError, match=f"{name} of clip clip-1 has shape.*as in clip clip-0"):
        _collate(
            [_clip(0, states=torch.ones(4, 7)), _clip(1, **{"states": torch.ones(4, 7), **values})]
        )


def test_a_plan_is_collated_with_its_own_step_stage_grid_and_masks():
    plan = MicroBatchPlan(
        step=9, stage=2, first_position=6, size=2, frames=4, fps=4.0, resolution=64,
        masks=MaskConfig(blocks=REFERENCE_MASKS[:1]), grid=GRID,
    )  # fmt: skip
    batch = collate_plan([_clip(position) for position in plan.positions], plan, 5)
    assert (batch.step, batch.stage, batch.first_position, len(batch.masks)) == (9, 2, 6, 1)
    assert torch.equal(
        batch.masks[0].context_BK,
        sample_masks(plan.masks, GRID, 5, plan.positions)[0].context_BK,
    )


def test_masks_of_unequal_length_come_out_of_a_worker_as_they_went_in():
    batch = _collate([_clip(p) for p in range(4)], masks=MaskConfig(truncate="none"))
    assert batch.masks[0].context_lengths is not None
    again = pickle.loads(pickle.dumps(Sent(batch=batch, place=None))).batch  # noqa: S301 - our own
    for sent, received in zip(batch.masks, again.masks, strict=True):
        assert received.kept() == sent.kept()
        assert torch.equal(received.context_BK, sent.context_BK)
        assert torch.equal(received.target_BK, sent.target_BK)
    pinned = again.to(torch.device("cpu"))
    assert pinned.masks[0].context_lengths == batch.masks[0].context_lengths
