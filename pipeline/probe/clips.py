"""A labelled video to the crops that the encoder sees: which frames, which squares."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.clip import SampleFault
from pipeline.data.augment import CropSpec, crop, evaluation_views, random_box
from pipeline.data.badmedia import BadMediaError
from pipeline.data.decode import DecodeLimits, decode_frames, probe_media
from pipeline.data.sampling import clip_times
from pipeline.probe.annotations import LabelledVideo, Split
from pipeline.probe.randaugment import rand_augment
from pipeline.probe.shards import read_sample
from pipeline.probe.stills import decode_still, is_still
from pipeline.probe.tasks import Augmentation, ClipConfig

_RANDOM_CROP = CropSpec(scale=(0.08, 1.0), aspect_ratio=(0.75, 4 / 3), horizontal_flip=0.0)
_AUGMENTATION_SEED = 0
_SHUFFLE_SEED = 0x0F3

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoClip:
    """The crops of one video, uint8 [V, S, C, T, H, W]: V views of each of its S segments."""

    index: int
    label: int
    video_VSCTHW: Tensor


class ClipReader:
    """Reads the videos of a split.

    Args:
        split: The videos.
        clip: Frames and crops.
        num_views: Crops of each video.
        augmentation: What varies where an epoch is given.
    """

    def __init__(
        self,
        split: Split,
        clip: ClipConfig,
        *,
        num_views: int,
        augmentation: Augmentation,
    ) -> None:
        self.split = split
        self.clip = clip
        self.num_views = num_views
        self.augmentation = augmentation
        self._limits = DecodeLimits()
        self._lengths: dict[int, tuple[float, int]] = {}

    def read(self, index: int, epoch: int | None = None) -> VideoClip | SampleFault:
        """The crops of one video, or why there are none.

        Args:
            index: Place of the video in the split.
            epoch: Draws the augmentation, a pure function of (epoch, index); None takes the
                middle of the video and its central square, always the same.
        """
        video = self.split.videos[index]
        try:
            segments = self._segments(video, index, epoch)
        except (BadMediaError, OSError) as error:
            return self.split.fault(index, video, str(error))
        return VideoClip(index=index, label=video.label, video_VSCTHW=torch.stack(segments, dim=1))

    def _segments(self, video: LabelledVideo, index: int, epoch: int | None) -> list[Tensor]:
        draw = 0 if epoch is None else epoch * len(self.split.videos) + index
        payload = _payload(video)
        if video.sample is None and is_still(video.path):
            still_THWC = decode_still(payload, max_pixels=self._limits.max_pixels)
            parts = [still_THWC.repeat(self.clip.frames, axis=0)] * self.clip.segments
        else:
            times_ST = self._times(payload, index, draw, epoch)
            # One pass over the file: times of all segments ascending, then dealt out again.
            order = np.argsort(times_ST.ravel(), kind="stable")
            decoded = decode_frames(payload, times_ST.ravel()[order], self._limits)
            frames = np.empty_like(decoded.frames_THWC)
            frames[order] = decoded.frames_THWC
            parts = np.split(frames, self.clip.segments)
        return [
            self._views(
                _ordered(part, self.clip, index=index, segment=number),
                draw * self.clip.segments + number,
                epoch,
            )
            for number, part in enumerate(parts)
        ]

    def _times(self, payload: bytes, index: int, draw: int, epoch: int | None) -> np.ndarray:
        """Presentation times of all segments, [S, T]."""
        random_time = epoch is not None and self.augmentation.random_time
        if index not in self._lengths:
            # Counted by decoding, once: SSv2's files carry neither duration nor number of frames.
            info = probe_media(payload, self._limits, decode_everything=True)
            self._lengths[index] = (info.duration_seconds, info.num_frames)
        duration_seconds, num_frames = self._lengths[index]
        return segment_times(
            self.clip,
            duration_seconds=duration_seconds,
            num_frames=num_frames,
            units=_units(draw, self.clip.segments, random=random_time),
        )

    def _views(self, frames_THWC: np.ndarray, draw: int, epoch: int | None) -> Tensor:
        """uint8 [V, C, T, H, W] of one segment."""
        if epoch is None:
            return _squares(frames_THWC, self.clip.resolution, self.num_views)
        if self.augmentation.rand_augment is not None:
            generator = np.random.default_rng([_AUGMENTATION_SEED + 2, draw])
            frames_THWC = rand_augment(frames_THWC, self.augmentation.rand_augment, generator)
        if not self.augmentation.random_crop:
            video_VCTHW = _squares(frames_THWC, self.clip.resolution, 1)
        else:
            height, width = frames_THWC.shape[1:3]
            box = random_box(
                _RANDOM_CROP, height=height, width=width, seed=_AUGMENTATION_SEED, position=draw
            )
            cut = crop(frames_THWC, box, self.clip.resolution, antialias=True)
            video_VCTHW = cut[None]
        return _erase(video_VCTHW, self.augmentation.erase, draw)


def segment_times(
    clip: ClipConfig, *, duration_seconds: float, num_frames: int, units: np.ndarray
) -> np.ndarray:
    """Presentation times of all segments, float64 [S, T], each row ascending.

    Args:
        clip: Frames, rate and number of segments.
        duration_seconds: Length of the video.
        num_frames: Its frames; only counted on where `frame_step` is asked for.
        units: One number in [0, 1) per segment; places it within its part of the video.
    """
    if clip.frame_step is not None:
        indices_ST = segment_indices(clip, num_frames=num_frames, units=units)
        # The middle of a frame's display: rounding cannot pick its neighbour.
        return (indices_ST + 0.5) * duration_seconds / num_frames
    fps = clip.fps or 1.0
    part_seconds = duration_seconds / clip.segments
    if part_seconds > clip.frames / fps:
        rows = [
            number * part_seconds + clip_times(part_seconds, clip.frames, fps, unit)
            for number, unit in enumerate(units)
        ]
    else:  # segments overlap: spread them from the start to the last place where one fits
        places = np.linspace(0, 1, clip.segments) if clip.segments > 1 else np.zeros(1)
        rows = [clip_times(duration_seconds, clip.frames, fps, place) for place in places]
    return np.stack(rows)


def segment_indices(clip: ClipConfig, *, num_frames: int, units: np.ndarray) -> np.ndarray:
    """Frame numbers of all segments, int64 [S, T], by the rule of V-JEPA 2's video evaluation.

    A video is cut into S parts; a part longer than the clip is sampled in a window placed by
    `units`. Otherwise the clip is spread over the video's start, its last frame repeated, and
    segments are shifted as far as the video allows.
    """
    step = clip.frame_step or 1
    window = clip.frames * step
    part = num_frames // clip.segments
    if part > window:
        starts = np.arange(clip.segments) * part + (units * (part - window)).astype(np.int64)
        spread = np.linspace(0, window, num=clip.frames)
        return starts[:, None] + np.clip(spread, 0, window - 1).astype(np.int64)
    length = min(window, num_frames) - 1
    num_spread = length // step
    spread = np.linspace(0, length, num=num_spread)
    padded = np.concatenate([spread, np.full(clip.frames - num_spread, length)])
    indices = np.clip(padded, 0, max(length - 1, 0)).astype(np.int64)
    shift = max(num_frames - window, 0) // max(clip.segments - 1, 1)
    return np.arange(clip.segments)[:, None] * shift + indices


def read_ahead(
    function: Callable[[Item], Made], items: Iterable[Item], *, threads: int
) -> Iterator[Made]:
    """`function` of each item in order, computed by threads a few items ahead.

    Decoding and resizing release the interpreter's lock, so threads do run side by side.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="probe-decode") as pool:
        ahead: list[Future[Made]] = [
            pool.submit(function, item) for item in islice(waiting, 4 * threads)
        ]
        while ahead:
            made = ahead.pop(0).result()
            ahead += [pool.submit(function, item) for item in islice(waiting, 1)]
            yield made


def _squares(frames_THWC: np.ndarray, resolution: int, num_views: int) -> Tensor:
    """Square crops along the longer side, uint8 [V, C, T, H, W]; one view is the central one.

    The short side becomes the resolution exactly, in training as in validation: a centre crop of
    a larger picture would show the encoder another scale.
    """
    views = evaluation_views(frames_THWC, resolution, 3)
    return torch.stack(views if num_views == 3 else views[1:2])


def _payload(video: LabelledVideo) -> bytes:
    if video.sample is None:
        return video.path.read_bytes()
    return read_sample(video.path, video.sample)


def _ordered(frames_THWC: np.ndarray, clip: ClipConfig, *, index: int, segment: int) -> np.ndarray:
    """The frames in the order that the task asks for; a video is always shuffled the same way."""
    if clip.frame_order == "forward":
        return frames_THWC
    if clip.frame_order == "reversed":
        return np.ascontiguousarray(frames_THWC[::-1])
    order = np.random.default_rng([_SHUFFLE_SEED, index, segment]).permutation(len(frames_THWC))
    return frames_THWC[order]


def _units(draw: int, num_segments: int, *, random: bool) -> np.ndarray:
    if not random:
        return np.full(num_segments, 0.5)
    return np.random.default_rng([_AUGMENTATION_SEED, draw]).random(num_segments)


def _erase(video_VCTHW: Tensor, probability: float, draw: int) -> Tensor:
    """Noise in one rectangle of 2 to 33 % of the picture, the same in all frames."""
    generator = np.random.default_rng([_AUGMENTATION_SEED + 1, draw])
    if generator.random() >= probability:
        return video_VCTHW
    height, width = video_VCTHW.shape[-2:]
    area = generator.uniform(0.02, 1 / 3) * height * width
    ratio = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
    box_height = min(height, max(1, round(np.sqrt(area / ratio))))
    box_width = min(width, max(1, round(np.sqrt(area * ratio))))
    top = generator.integers(height - box_height + 1)
    left = generator.integers(width - box_width + 1)
    noise = generator.integers(0, 256, (3, 1, box_height, box_width), dtype=np.uint8)
    erased = video_VCTHW.clone()
    erased[..., top : top + box_height, left : left + box_width] = torch.from_numpy(noise)
    return erased
