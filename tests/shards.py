"""Small real datasets for tests: H.264 clips in tar shards with their index."""

import hashlib
import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import webdataset as wds

from pipeline.clip import Grid, MicroBatchPlan
from pipeline.data.indexing import build_index
from pipeline.data.layout import Sidecar
from pipeline.masks.blocks import BlockMask, MaskConfig
from pipeline.schedule import LearningRate
from pipeline.stages import Share, Stage, micro_batch_plans

FPS = 8
WIDTH, HEIGHT = 64, 48
GLOBAL_BATCH = 8
MASKS = MaskConfig(blocks=(BlockMask(num_blocks=2, spatial_scale=(0.3, 0.3)),))


def render_video(seed: int, num_frames: int) -> bytes:
    """A patch that drifts over a texture, as MP4 bytes; every seed looks different."""
    generator = np.random.default_rng(seed)
    texture = generator.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    background = np.kron(texture, np.ones((8, 8, 1), dtype=np.uint8))
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, FPS)
        for number in range(num_frames):
            picture = background.copy()
            left = (number * 3) % (WIDTH - 12)
            picture[8:24, left : left + 12] = (255 * seed) // 64 % 256
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_dataset(
    folder: Path,
    num_samples: int,
    *,
    first_seed: int = 0,
    extra: Callable[[int], dict[str, bytes]] | None = None,
) -> Path:
    """Samples of 8 to 23 frames in two shards.

    Args:
        folder: Where to write.
        num_samples: How many.
        first_seed: Seed of the first video.
        extra: Further members of a sample by suffix, or other bytes for its `mp4`.
    """
    folder.mkdir(parents=True)
    for shard in range(2):
        path = folder / f"shard-{shard:06d}.tar"
        # Given a file, because by name it refuses to write where WDS_SECURE is set.
        with path.open("wb") as file, wds.TarWriter(file, mtime=0) as writer:
            for number in range(shard, num_samples, 2):
                members = extra(number) if extra else {}
                writer.write(_sample(first_seed + number, members))
    build_index(folder)
    return folder


def make_stages(micro_batch: int = 2) -> tuple[Stage, ...]:
    """Two stages: 3 steps of 4 frames at 32 pixels, then 3 of 8 frames at 48 pixels."""
    rate = LearningRate(shape="constant", start=1e-3, peak=1e-3, end=1e-3)
    sizes = [("short", 4, 32), ("long", 8, 48)]
    return tuple(
        Stage(
            name=name,
            steps=3,
            frames=frames,
            fps=4.0,
            resolution=resolution,
            micro_batch=micro_batch,
            learning_rate=rate,
        )
        for name, frames, resolution in sizes
    )


def make_plans(
    *, rank: int = 0, world_size: int = 1, first_step: int = 1, last_step: int = 6
) -> tuple[MicroBatchPlan, ...]:
    """One rank's plans of the run of `make_stages`."""
    share = Share(global_batch=GLOBAL_BATCH, rank=rank, world_size=world_size)
    plans = micro_batch_plans(make_stages(), share, first_step, last_step, MASKS, grid_of)
    return tuple(plans)


def grid_of(frames: int, resolution: int) -> Grid:
    """Tokens of 2 × 8 × 8 pixels."""
    return Grid(t=frames // 2, h=resolution // 8, w=resolution // 8)


def _sample(seed: int, members: dict[str, bytes]) -> dict[str, object]:
    num_frames = 8 + (seed * 5) % 16
    video = members.get("mp4") or render_video(seed, num_frames)
    key = f"clip-{seed:05d}"
    sidecar = Sidecar(
        key=key,
        source=f"{key}.mp4",
        source_sha256="0" * 64,
        segment_start_seconds=0.0,
        segment_end_seconds=num_frames / FPS,
        num_frames=num_frames,
        fps=float(FPS),
        duration_seconds=num_frames / FPS,
        width=WIDTH,
        height=HEIGHT,
        codec="h264",
        video_bytes=len(video),
        video_sha256=hashlib.sha256(video).hexdigest(),
    )
    return {"__key__": key, "json": sidecar.model_dump_json().encode()} | members | {"mp4": video}
