"""A contact sheet: clips as the model gets them in each stage, and what masks leave of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from torch import Tensor

from pipeline.clip import ClipBatch, Grid, MaskSet, MicroBatchPlan
from pipeline.data.loader import make_loader
from pipeline.masks.collate import collate_plan
from pipeline.run import RunConfig
from pipeline.stages import Share, micro_batch_plans

_MAX_MOMENTS = 8
_SHOWN_PIXELS = 112
_GAP_PIXELS = 2
_DPI = 110
# In inches: room for a label, and a stage's title in place of a strip.
_LABEL_INCHES, _TITLE_INCHES = 0.24, 0.5
# Context stays as it is; what has to be predicted is blue, what is in neither set dark red: black
# would look like a dark video.
_TARGET_COLOUR = np.array([52, 104, 192], dtype=np.float32)
_DROPPED_COLOUR = np.array([84, 24, 30], dtype=np.float32)
_TARGET_SHARE, _DROPPED_SHARE = 0.62, 0.88


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewRow:
    """One strip of the sheet: the same moments of a clip, plain or under one mask."""

    label: str
    frames_THWC: np.ndarray
    """uint8 RGB, at most 8 moments, scaled to be seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePreview:
    """The clips of one stage."""

    title: str
    rows: tuple[PreviewRow, ...]


def stage_previews(config: RunConfig, num_clips: int) -> Iterator[StagePreview]:
    """The first clips that each stage of a run trains on: same samples, crops, flips and masks.

    Args:
        config: The run; its loader's code path is used, in this process.
        num_clips: Clips to show of a stage's first micro-batch.

    Raises:
        JepaError: The dataset cannot be read, or its clips cannot be used.
    """
    share = Share(global_batch=config.global_batch, rank=0, world_size=1)
    first_step = 1
    for stage in config.stages:
        plans = micro_batch_plans(
            config.stages, share, first_step, first_step, config.masks, config.grid
        )
        plan = next(plans)
        yield StagePreview(
            title=f"{stage.name}: {plan.frames} frames at {plan.fps:g} fps, "
            f"{plan.resolution} pixels, {plan.grid.num_tokens} tokens",
            rows=tuple(_rows(_load(config, plan), num_clips)),
        )
        first_step += stage.steps


def draw_sheet(previews: list[StagePreview], path: Path) -> None:
    """Draws all stages below one another as a PNG file.

    Raises:
        OSError: It cannot be written.
    """
    strips = [[_strip(row.frames_THWC) for row in preview.rows] for preview in previews]
    pixels = [strip for stage in strips for strip in stage]
    height = sum(strip.shape[0] / _DPI + _LABEL_INCHES for strip in pixels)
    height += _TITLE_INCHES * len(previews)
    width = max(max(strip.shape[1] for strip in pixels) / _DPI, 7.0)
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=_DPI)
    top = height
    for preview, stage in zip(previews, strips, strict=True):
        top -= _TITLE_INCHES
        figure.text(0.01, (top + 0.12) / height, preview.title, fontsize=12)
        for row, strip in zip(preview.rows, stage, strict=True):
            top -= strip.shape[0] / _DPI + _LABEL_INCHES
            box = (0.0, top, strip.shape[1] / _DPI / width, strip.shape[0] / _DPI)
            axis = figure.add_axes((box[0], box[1] / height, box[2], box[3] / height))
            axis.imshow(strip, interpolation="nearest", aspect="auto")
            axis.set_axis_off()
            label = (box[1] + box[3] + 0.06) / height
            figure.text(0.01, label, row.label, fontsize=8)
    figure.savefig(path, format="png", metadata={"Software": None})


def _load(config: RunConfig, plan: MicroBatchPlan) -> ClipBatch:
    # The whole micro-batch: the reference's rule cuts masks to its shortest.
    alone = config.data.model_copy(update={"workers": 0})
    loader = make_loader(
        alone, plans=(plan,), collate=partial(collate_plan, seed=config.seed), seed=config.seed
    )
    try:
        return next(loader)
    finally:
        loader.close()


def _rows(batch: ClipBatch, num_clips: int) -> Iterator[PreviewRow]:
    grid = batch.grid
    num_frames = batch.video_BCTHW.shape[2]
    tubelet = num_frames // grid.t
    moments = np.unique(np.linspace(0, grid.t - 1, min(grid.t, _MAX_MOMENTS)).round().astype(int))
    for number in range(min(num_clips, len(batch.keys))):
        video_THWC = batch.video_BCTHW[number].permute(1, 2, 3, 0)
        frames_THWC = video_THWC[torch.from_numpy(moments * tubelet)].numpy()
        times = batch.times_BT[number]
        label = f"{batch.keys[number]}, {times[0]:.2f} to {times[-1]:.2f} s of its video"
        yield PreviewRow(label=label, frames_THWC=_resized(frames_THWC))
        for mask_number, mask in enumerate(batch.masks):
            fate_THW = _fates(mask, number, grid)[moments]
            context, target = (int((fate_THW == fate).sum()) for fate in (1, 2))
            yield PreviewRow(
                label=f"mask {mask_number + 1}: {context / fate_THW.size:.0%} context (as is), "
                f"{target / fate_THW.size:.0%} to predict (blue), the rest left out (red), "
                "of the moments shown",
                frames_THWC=_resized(_overlaid(frames_THWC, fate_THW)),
            )


def _fates(mask: MaskSet, clip: int, grid: Grid) -> np.ndarray:
    """What becomes of each token: 0 left out, 1 context, 2 target; [t, h, w]."""
    fate_N = np.zeros(grid.num_tokens, dtype=np.int8)
    fate_N[_kept(mask.context_BK, mask.context_lengths, clip)] = 1
    fate_N[_kept(mask.target_BK, mask.target_lengths, clip)] = 2
    return fate_N.reshape(grid.t, grid.h, grid.w)


def _kept(index_BK: Tensor, lengths: tuple[int, ...] | None, clip: int) -> np.ndarray:
    length = index_BK.shape[1] if lengths is None else lengths[clip]
    return index_BK[clip, :length].numpy()


def _overlaid(frames_THWC: np.ndarray, fate_THW: np.ndarray) -> np.ndarray:
    rows, columns = (frames_THWC.shape[axis] // fate_THW.shape[axis] for axis in (1, 2))
    fate = fate_THW.repeat(rows, axis=1).repeat(columns, axis=2)[..., None]
    pictures = frames_THWC.astype(np.float32)
    target = (1 - _TARGET_SHARE) * pictures + _TARGET_SHARE * _TARGET_COLOUR
    dropped = (1 - _DROPPED_SHARE) * pictures + _DROPPED_SHARE * _DROPPED_COLOUR
    shown = np.where(fate == 2, target, np.where(fate == 1, pictures, dropped))
    return shown.astype(np.uint8)


def _resized(frames_THWC: np.ndarray) -> np.ndarray:
    """About `_SHOWN_PIXELS` high, by repeating or leaving out lines: exact pixels, no smoothing."""
    height = frames_THWC.shape[1]
    stride, times = max(1, round(height / _SHOWN_PIXELS)), max(1, _SHOWN_PIXELS // height)
    return frames_THWC[:, ::stride, ::stride].repeat(times, axis=1).repeat(times, axis=2)


def _strip(frames_THWC: np.ndarray) -> np.ndarray:
    gap = ((0, 0), (0, 0), (0, _GAP_PIXELS), (0, 0))
    return np.concatenate(list(np.pad(frames_THWC, gap, constant_values=255)), axis=1)


def with_dataset(config: RunConfig, dataset: Path) -> RunConfig:
    """The same run on one dataset alone."""
    source = config.data.sources[0].model_copy(update={"path": str(dataset), "weight": 1.0})
    data = config.data.model_copy(update={"sources": (source,)})
    return config.model_copy(update={"data": data})
