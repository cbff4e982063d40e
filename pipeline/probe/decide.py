"""Whether tokens are kept on disk or encoded in every epoch: an estimate that is told beforehand.

It reads nothing but the task, the encoder and the machine's kind, so a probe that is run again
decides as before.
"""

import os
from dataclasses import dataclass, replace

from pipeline.models.cost import encoder_flops
from pipeline.models.encoder import Encoder
from pipeline.probe.chunks import Extraction
from pipeline.probe.tasks import TaskConfig

# What encoders reach on a core in fp32, and on a data-centre GPU of 2020 or later in bf16; a disk;
# decoding and resizing a frame. Wrong by a factor of three they decide the same in most cases:
# the two ways differ by the number of epochs.
_CORE_FLOPS, _GPU_FLOPS = 2e10, 1e14
_DISK_BYTES = 1e9
_FRAME_SECONDS = 2e-3
_GIB = 2**30
_NOT_NEEDED = "no head needs them"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPlan:
    """Where the attentive head's tokens of one split come from, and why."""

    split: str
    num_videos: int
    token_gib: float
    pooled_gib: float
    keep_tokens: bool
    passes: float
    """How often the head sees every video."""
    cached_seconds: float
    """Encoding once, writing, and reading in every pass."""
    encoded_seconds: float
    """Encoding in every pass."""
    why: str

    @property
    def words(self) -> str:
        """One sentence for people, before anything is encoded."""
        pooled = _size(self.pooled_gib)
        if self.why == _NOT_NEEDED:
            return f"{self.split}: pooled features of {self.num_videos} videos are {pooled}"
        kept = "kept on disk" if self.keep_tokens else "encoded in every epoch"
        return (
            f"{self.split}: tokens of {self.num_videos} videos are {_size(self.token_gib)} in "
            f"bf16, pooled features {pooled}; tokens are {kept}, {self.why}"
        )


def plan_tokens(asked: Extraction, *, num_seeds: int, is_varied: bool) -> TokenPlan:
    """Decides for one split.

    Args:
        asked: The features, with their tokens.
        num_seeds: Sweeps that see the videos.
        is_varied: Whether the head is to see other crops in every epoch.
    """
    task, num_videos = asked.task, len(asked.split.videos)
    # Training clips are fitted on or, held out, judged on; those of validation are judged on.
    passes = float(task.attentive.epochs * num_seeds)
    token_gib = asked.token_bytes * num_videos / _GIB
    once = _encode_seconds(asked) * num_videos
    read = token_gib * _GIB / _DISK_BYTES
    cached, encoded = once + read * (1 + passes), once * passes
    keep, why = _choice(task, token_gib, cached, encoded, is_varied=is_varied)
    return TokenPlan(
        split=asked.split.name,
        num_videos=num_videos,
        token_gib=token_gib,
        pooled_gib=asked.step_bytes * num_videos / _GIB,
        keep_tokens=keep,
        passes=passes,
        cached_seconds=cached,
        encoded_seconds=encoded,
        why=why,
    )


def without_tokens(plan: TokenPlan) -> TokenPlan:
    """The plan where no head needs tokens."""
    return replace(plan, keep_tokens=False, why=_NOT_NEEDED)


def _choice(
    task: TaskConfig, token_gib: float, cached: float, encoded: float, *, is_varied: bool
) -> tuple[bool, str]:
    if is_varied:
        return False, "since the task's augmentation varies them"
    if task.tokens != "auto":
        return task.tokens == "cache", f"as `tokens: {task.tokens}` asks"
    if token_gib > task.token_cache_gib:
        return False, f"since `token_cache_gib` is {task.token_cache_gib:g}"
    told = f"estimated {_time(cached)} with a cache, {_time(encoded)} without"
    return cached < encoded, told


def _encode_seconds(asked: Extraction) -> float:
    """Decoding and encoding one video."""
    module, clip = asked.encoder.module, asked.task.clip
    frames = clip.frames * clip.segments
    decode = frames * _FRAME_SECONDS / asked.task.decode_threads
    if not isinstance(module, Encoder):
        return decode
    flops = encoder_flops(module.config, asked.encoder.grid.num_tokens)
    on_gpu = asked.encoder.device.type == "cuda"
    rate = _GPU_FLOPS if on_gpu else _CORE_FLOPS * len(os.sched_getaffinity(0))
    return max(decode, flops * clip.segments * asked.num_views / rate)


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
