"""Frozen tokens of labelled videos: encoded once and kept on disk, or encoded again every epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.clip import SampleFault
from pipeline.data.augment import normalise
from pipeline.probe.annotations import Split
from pipeline.probe.clips import ClipReader, VideoClip, read_ahead
from pipeline.probe.fit import InputBatch
from pipeline.probe.frozen import FrozenEncoder
from pipeline.probe.tasks import ClipConfig, Pooling, TaskConfig


class TokenRows(Protocol):
    """Tokens that can be read row by row."""

    def rows(self, index_B: Tensor) -> Tensor:
        """Tokens [B, V, N, D] of some rows, bf16."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Features of the usable videos of one split.

    `steps_NVPCD` holds the mean token of each of C cells of each of P time steps, fp32; `tokens`
    reads all tokens, bf16, or is None if they are not kept.
    """

    steps_NVPCD: Tensor
    tokens: TokenRows | None
    labels_N: Tensor
    index_N: Tensor
    """Place of each row in the split."""
    faults: tuple[SampleFault, ...]
    from_cache: bool
    held: IO[bytes] | None = None
    """Keeps other processes from removing the features while these are used."""

    def pooled(self, pooling: Pooling) -> Tensor:
        """One vector per clip and view, fp32 [N, V, F].

        `clip` averages everything, F = D; `time` joins the steps, F = P · D; `cells` joins steps
        and cells, F = P · C · D. The mean over time is the same for a movement and its reverse
        but for what single tokens hold of the direction; joined steps keep the order even where
        the tokens do not, joined cells the place.
        """
        steps_NVPCD = self.steps_NVPCD
        if pooling == "clip":
            return steps_NVPCD.mean(dim=(2, 3))
        return (steps_NVPCD.mean(dim=3) if pooling == "time" else steps_NVPCD).flatten(2)


class CachedInputs:
    """Inputs [N, V, …] that are there already; `epoch` changes nothing."""

    def __init__(
        self, inputs_NV: np.ndarray, labels_N: Tensor, index_N: Tensor | None = None
    ) -> None:
        self.inputs_NV = inputs_NV
        self.labels_N = labels_N
        self._index_N = torch.arange(len(labels_N)) if index_N is None else index_N

    def batches(
        self,
        order: Tensor,
        size: int,
        *,
        epoch: int | None = None,  # noqa: ARG002
    ) -> Iterator[InputBatch]:
        """Batches of `size` clips in `order`, fp32."""
        for row_B in order.split(size):
            yield InputBatch(
                inputs_BV=torch.from_numpy(self.inputs_NV[row_B.numpy()]).float(),
                labels_B=self.labels_N[row_B],
                index_B=self._index_N[row_B],
            )


class StoredTokens:
    """Tokens read from disk, the next batch while heads compute on this one."""

    def __init__(self, features: Features) -> None:
        if features.tokens is None:
            raise RuntimeError("tokens were not kept")
        self._tokens = features.tokens
        self._index_N = features.index_N
        self.labels_N = features.labels_N

    def batches(
        self,
        order: Tensor,
        size: int,
        *,
        epoch: int | None = None,  # noqa: ARG002
    ) -> Iterator[InputBatch]:
        """Batches of `size` clips in `order`, bf16."""
        for rows in read_ahead(
            lambda row_B: (row_B, self._tokens.rows(row_B)), order.split(size), threads=1
        ):
            row_B, tokens_BVND = rows
            yield InputBatch(
                inputs_BV=tokens_BVND,
                labels_B=self.labels_N[row_B],
                index_B=self._index_N[row_B],
            )


class LiveInputs:
    """Tokens [B, V, N, D] encoded when they are asked for.

    Videos that turn out bad are left out of their batch and kept in `faults`.

    Args:
        encoder: The frozen network.
        split: Its videos.
        task: Clips, threads and augmentation.
        num_views: Crops of each video.
        rounded: Round tokens to bf16, as those on disk are, so that it does not matter to a head
            where its tokens come from.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        split: Split,
        task: TaskConfig,
        *,
        num_views: int,
        rounded: bool = True,
    ) -> None:
        self._encoder = encoder
        self._split = split
        self._task = task
        self._rounded = rounded
        self._reader = ClipReader(
            split, task.clip, num_views=num_views, augmentation=task.augmentation
        )
        self.labels_N = torch.tensor([video.label for video in split.videos])
        self.faults: dict[int, SampleFault] = {}

    def batches(self, order: Tensor, size: int, *, epoch: int | None) -> Iterator[InputBatch]:
        """Batches of at most `size` clips in `order`; `epoch` draws the augmentation."""
        clips = self._clips(order, epoch)
        while parts := list(self._encoded(islice(clips, size))):
            yield InputBatch(
                inputs_BV=torch.cat([part.inputs_BV for part in parts]),
                labels_B=torch.cat([part.labels_B for part in parts]),
                index_B=torch.cat([part.index_B for part in parts]),
            )

    def _encoded(self, clips: Iterator[VideoClip]) -> Iterator[InputBatch]:
        """As many clips at a time as are encoded at once: their pictures need not pile up."""
        while group := list(islice(clips, self._task.encode_batch)):
            video = torch.stack([clip.video_VSCTHW for clip in group])
            tokens = encode(self._encoder, video, self._task.clip)
            yield InputBatch(
                inputs_BV=tokens.bfloat16() if self._rounded else tokens,
                labels_B=torch.tensor([clip.label for clip in group]),
                index_B=torch.tensor([clip.index for clip in group]),
            )

    def _clips(self, order: Tensor, epoch: int | None) -> Iterator[VideoClip]:
        reads = read_ahead(
            lambda index: (index, self._reader.read(index, epoch)),
            order.tolist(),
            threads=self._task.decode_threads,
        )
        for index, made in reads:
            if isinstance(made, VideoClip):
                yield made
                continue
            self.faults[index] = made
            self._split.check_faults((*self._split.faults, *self.faults.values()))


@torch.no_grad()
def encode(encoder: FrozenEncoder, video_BVSCTHW: Tensor, clip: ClipConfig) -> Tensor:
    """Tokens of a batch of clips, [B, V, N, D] on the encoder's device.

    Segments are encoded one by one and joined along time: N runs over segment, layer (where the
    task names several), time, height, width.
    """
    flat = normalise(video_BVSCTHW.flatten(0, 2).to(encoder.device))
    dtype = encoder.autocast
    with torch.autocast(encoder.device.type, dtype=dtype, enabled=dtype is not None):
        found = encoder.module(flat, layers=clip.layers)
    tokens = torch.cat(found, dim=1) if clip.layers else found
    return tokens.unflatten(0, video_BVSCTHW.shape[:3]).flatten(2, 3)


def step_means(encoder: FrozenEncoder, tokens_BVND: Tensor, cells: int) -> Tensor:
    """Mean token of each cell of each time step, fp32 [B, V, P, C, D].

    P runs over segment, layer and time; C over `cells` bands of height, then of width.
    """
    grid = encoder.grid
    tokens_BVPHWD = tokens_BVND.float().unflatten(2, (-1, grid.h, grid.w))
    places = tokens_BVPHWD.movedim(-1, 3).flatten(0, 3)
    means = adaptive_avg_pool2d(places.unsqueeze(1), cells).flatten(1)
    return means.unflatten(0, tokens_BVPHWD.movedim(-1, 3).shape[:4]).transpose(-1, -2)


def num_tokens(encoder: FrozenEncoder, clip: ClipConfig) -> int:
    """Tokens of one view of a video, N."""
    return encoder.grid.num_tokens * clip.segments * max(1, len(clip.layers))
