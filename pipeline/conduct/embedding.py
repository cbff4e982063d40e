"""One shard of a dataset → a feature per clip, kept beside the dataset: a Ray task each.

A kill costs the shard in hand. What is kept is named after the encoder's weights, the shard's
bytes and how clips are taken, so it never serves for anything else.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import evaluation_views, normalise
from pipeline.data.confine import DecodeLimits, confined
from pipeline.data.decode import decode_frames
from pipeline.data.format import BadMediaError, ShardIndex
from pipeline.data.manifest import write_durably
from pipeline.data.sampling import clip_times
from pipeline.exchange import load_encoder
from pipeline.models.encoder import Encoder

FOLDER = ".curate"
_CLIPS_AT_A_TIME = 8
_LIMITS = DecodeLimits()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSize:
    """The clip that stands for a sample: from its middle, the centre of its pictures."""

    frames: int
    fps: float
    resolution: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """One shard to embed."""

    dataset: str
    shard: int
    encoder: str
    which: Literal["teacher", "student"]
    clip: ClipSize
    result: str
    """Where the features go, float32 [samples of the shard, D]."""


def feature_path(dataset: Path, shard_sha256: str, encoder_digest: str, clip: ClipSize) -> Path:
    """Where the features of a shard lie once they are there."""
    name = hashlib.sha256(f"{shard_sha256} {encoder_digest} {clip}".encode()).hexdigest()[:32]
    return dataset / FOLDER / f"{name}.npy"


def embed_shard(job: ShardJob, report: Callable[[object], None]) -> int:
    """Writes the features of one shard; clips that cannot be decoded get a row of NaN.

    Returns:
        How many could not be decoded.

    Raises:
        CheckpointError: The encoder cannot be read.
        StorageError: The dataset cannot be read or written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(job.encoder, which=job.which).to(device)
    index = ShardIndex.open(job.dataset, verify=False)
    samples = np.flatnonzero(index.records["shard"] == job.shard).tolist()
    features = np.full((len(samples), encoder.config.dims.width), np.nan, dtype=np.float32)
    for first in range(0, len(samples), _CLIPS_AT_A_TIME):
        group = samples[first : first + _CLIPS_AT_A_TIME]
        clips = [(first + row, _clip(index, sample, job.clip)) for row, sample in enumerate(group)]
        good = [(row, video) for row, video in clips if video is not None]
        if good:
            rows, videos = zip(*good, strict=True)
            features[list(rows)] = _embed(encoder, torch.stack(videos).to(device))
        report(first + len(group))
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, features, version=(1, 0), allow_pickle=False)
    write_durably(Path(job.result), buffer.getvalue())
    return int(np.isnan(features[:, 0]).sum())


def middle_picture(index: ShardIndex, sample: int) -> np.ndarray:
    """What a sample shows in its middle, uint8 RGB [H, W, 3].

    Raises:
        BadMediaError: It cannot be decoded.
    """
    record = index.record(sample)
    payload = index.read_member(record)
    return decode_frames(
        payload, np.array([record.duration_seconds / 2]), _LIMITS
    ).frames_THWC[0]  # fmt: skip


def _clip(index: ShardIndex, sample: int, clip: ClipSize) -> Tensor | None:
    record = index.record(sample)
    times = clip_times(record.duration_seconds, clip.frames, clip.fps, unit=0.5)
    try:
        payload = index.read_member(record)
        with confined(_LIMITS):
            frames_THWC = decode_frames(payload, times, _LIMITS).frames_THWC
    except BadMediaError:
        # Counted by who reads the row: it stays NaN.
        return None
    return evaluation_views(frames_THWC, clip.resolution)[0]


@torch.inference_mode()
def _embed(encoder: Encoder, video_BCTHW: Tensor) -> np.ndarray:
    tokens_BND = encoder(normalise(video_BCTHW))
    mean_BD = torch.nn.functional.normalize(tokens_BND.float().mean(dim=1), dim=-1)
    return mean_BD.cpu().numpy()
