"""Clips in, one micro-batch with its masks out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.clip import Clip, ClipBatch, Grid, MicroBatchPlan
from pipeline.errors import DataError
from pipeline.masks.blocks import MaskConfig
from pipeline.masks.sample import sample_masks


def collate_plan(clips: Sequence[Clip], plan: MicroBatchPlan, seed: int) -> ClipBatch:
    """Collate the clips of a planned micro-batch; `seed` is the run's seed."""
    return collate(
        clips, step=plan.step, stage=plan.stage, grid=plan.grid, masks=plan.masks, seed=seed
    )


def collate(
    clips: Sequence[Clip],
    *,
    step: int,
    stage: int,
    grid: Grid,
    masks: MaskConfig,
    seed: int,
) -> ClipBatch:
    """Stack clips of consecutive positions and draw their masks.

    Videos lie in memory as [B, T, H, W, C], the order that cropping leaves them in; another one
    would cost a tenth of a loader's time. Those that lie behind each other already, as the loader
    puts them, are not copied.

    What only some sources carry: `text` is a tuple with None for clips without one, and None if
    no clip has text; `states` and `actions` are stacked only if every clip has them, else None,
    because numbers cannot be left out of a tensor. An objective that needs them says so in its
    `needs`, which is checked against the shards before the first step.

    Raises:
        DataError: Clips differ in shape, or states or actions differ in theirs.
        ConfigError: A mask does not fit the grid.
    """
    positions = [clip.ref.position for clip in clips]
    texts = tuple(clip.text for clip in clips)
    return ClipBatch(
        step=step,
        stage=stage,
        first_position=positions[0],
        grid=grid,
        keys=tuple(clip.key for clip in clips),
        refs=tuple(clip.ref for clip in clips),
        video_BCTHW=_stack_videos(clips),
        times_BT=_stack(clips, "times", [clip.times for clip in clips]),
        masks=sample_masks(masks, grid, seed, positions),
        text=None if all(text is None for text in texts) else texts,
        states_BTS=_stack_if_all(clips, "states", [clip.states for clip in clips]),
        actions_BTA=_stack_if_all(clips, "actions", [clip.actions for clip in clips]),
        faults=tuple(fault for clip in clips for fault in clip.faults),
    )


def _stack_if_all(
    clips: Sequence[Clip], name: str, tensors: Sequence[Tensor | None]
) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return _stack(clips, name, present) if len(present) == len(tensors) else None


def _stack_videos(clips: Sequence[Clip]) -> Tensor:
    videos_CTHW = [clip.video_CTHW for clip in clips]
    _check_shapes(clips, "video", videos_CTHW)
    if _follow_one_another(videos_CTHW):
        first = videos_CTHW[0]
        size, stride = (len(clips), *first.shape), (first.numel(), *first.stride())
        return first.as_strided(size, stride)
    video_BTHWC = torch.stack([video.permute(1, 2, 3, 0) for video in videos_CTHW])
    return video_BTHWC.permute(0, 4, 1, 2, 3)


def _follow_one_another(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie behind each other in one piece of memory."""
    first = tensors[0]
    return all(
        tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + number * first.numel()
        and tensor.stride() == first.stride()
        for number, tensor in enumerate(tensors)
    )


def _stack(clips: Sequence[Clip], name: str, tensors: Sequence[Tensor]) -> Tensor:
    _check_shapes(clips, name, tensors)
    return torch.stack(list(tensors))


def _check_shapes(clips: Sequence[Clip], name: str, tensors: Sequence[Tensor]) -> None:
    for clip, tensor in zip(clips, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise DataError(
                f"{name} of clip {clip.key} has shape {list(tensor.shape)}, expected "
                f"{list(tensors[0].shape)} as in clip {clips[0].key} of the same micro-batch",
                remedy="Sources of one mixture must carry states and actions of equal width.",
            )
