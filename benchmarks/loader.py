"""Loader throughput per core, against plain decoding of the same clips.

Three ways to the same pictures (same samples, same moments, same crops), interleaved in rounds:

    plain    PyAV and torchvision in a bare loop over videos that lie in memory: the ceiling
    decoder  our bounded decoder and crop in the same loop
    loader   everything: order, index, read, checksum, decode, crop, masks, collate, worker process

The figure is clips per CPU second, of the worker and the training process together. CPU seconds
do not depend on what else the machine is doing, wall time does. Run: python -m benchmarks.loader
"""

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch

from benchmarks.result import print_table, spread, write_result
from benchmarks.shards import write_real_dataset
from pipeline.clip import Clip, ClipBatch, Grid, MicroBatchPlan
from pipeline.data.augment import CropBox, CropSpec, crop, random_box, transforms
from pipeline.data.clips import make_order, open_sources
from pipeline.data.decode import DecodeLimits, decode_frames
from pipeline.data.format import ShardIndex
from pipeline.data.loader import make_loader
from pipeline.data.order import OrderSpec, Purpose, clip_ref, random_units
from pipeline.data.sampling import clip_times
from pipeline.data.settings import DataConfig, Source
from pipeline.masks.blocks import MaskConfig
from pipeline.masks.collate import collate_plan

SEED = 1
MICRO_BATCH = 8
FPS = 4.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """One clip to be decoded by hand: its bytes, the moments wanted and where it is cut."""

    payload: bytes
    times: np.ndarray
    box: CropBox


def main() -> int:
    """Measure, print a table, write benchmarks/results/loader.json."""
    arguments = _arguments()
    torch.set_num_threads(1)
    transforms()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = arguments.dataset or write_real_dataset(Path(scratch) / "real")
        config = DataConfig(sources=(Source(path=str(dataset)),), workers=1)
        plans = _plans(arguments.clips, arguments.frames, arguments.resolution)
        work = _work(config, plans)
        _check_same_pictures(config, plans, work)
        rates: dict[str, list[float]] = {"plain": [], "decoder": [], "loader": []}
        for _ in range(arguments.rounds):
            rates["plain"].append(_clips_per_second(_plain_clip, work, arguments.resolution))
            rates["decoder"].append(_clips_per_second(_decoder_clip, work, arguments.resolution))
            rates["loader"].append(_loader_clips_per_second(config, plans))
        wall = _wall_clips_per_second(config, plans, psutil.cpu_count() or 1)
    _report(rates, wall, vars(arguments) | {"dataset": str(arguments.dataset or "real clips")})
    return 0


def _report(rates: dict[str, list[float]], wall: float, settings: dict[str, Any]) -> None:
    ratios = [ours / plain for ours, plain in zip(rates["loader"], rates["plain"], strict=True)]
    figures = {f"{way}_clips_per_cpu_second": spread(found) for way, found in rates.items()}
    figures["loader_to_plain"] = spread(ratios, digits=3)
    to_decoder = zip(rates["loader"], rates["decoder"], strict=True)
    figures["loader_to_decoder"] = spread([ours / loop for ours, loop in to_decoder], digits=3)
    figures["all_cores_wall_clips_per_second"] = {"once": round(wall, 2)}
    rows = [(name, *values.values()) for name, values in figures.items() if len(values) == 3]
    print_table("Loader against plain decoding", ("", "median", "min", "max"), rows)
    path = write_result("loader", figures, settings)
    print(f"all cores, wall time: {wall:.1f} clips/s; written to {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dataset", type=Path, help="prepared dataset; our real clips if left out")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=256)
    return parser.parse_args()


def _plans(num_clips: int, frames: int, resolution: int) -> tuple[MicroBatchPlan, ...]:
    grid = Grid(t=frames // 2, h=resolution // 16, w=resolution // 16)
    return tuple(
        MicroBatchPlan(
            step=number + 1,
            stage=0,
            first_position=number * MICRO_BATCH,
            size=MICRO_BATCH,
            frames=frames,
            fps=FPS,
            resolution=resolution,
            masks=MaskConfig(),
            grid=grid,
        )
        for number in range(num_clips // MICRO_BATCH)
    )


def _work(config: DataConfig, plans: Sequence[MicroBatchPlan]) -> list[Work]:
    """The clips that the loader will give, with their bytes already in memory."""
    datasets = open_sources(config)
    order = make_order(config, datasets, SEED)
    return [
        _work_of(order, datasets, position, plan) for plan in plans for position in plan.positions
    ]


def _work_of(
    order: OrderSpec, datasets: Sequence[ShardIndex], position: int, plan: MicroBatchPlan
) -> Work:
    ref = clip_ref(order, position)
    record = datasets[ref.source].record(ref.sample)
    unit = float(random_units(SEED, position, Purpose.CLIP_START, 1)[0])
    spec = CropSpec(scale=(0.3, 1.0), aspect_ratio=(0.75, 1.35), horizontal_flip=0.5)
    size = {"height": record.height, "width": record.width}
    return Work(
        payload=datasets[ref.source].read_member(record),
        times=clip_times(record.duration_seconds, plan.frames, plan.fps, unit),
        box=random_box(spec, seed=SEED, position=position, **size),
    )


def _check_same_pictures(
    config: DataConfig, plans: Sequence[MicroBatchPlan], work: Sequence[Work]
) -> None:
    """All three ways have to give the same pixels, or the comparison would mean nothing."""
    collate = partial(collate_plan, seed=SEED)
    with make_loader(config, plans=plans[:1], collate=collate, seed=SEED) as loader:
        for video, item in zip(next(loader).video_BCTHW, work, strict=False):
            for make_clip in (_plain_clip, _decoder_clip):
                if not torch.equal(video, make_clip(item, plans[0].resolution)):
                    raise RuntimeError(f"{make_clip.__name__} gives other pictures than the loader")


def _clips_per_second(make_clip: Any, work: Sequence[Work], resolution: int) -> float:
    begin = time.process_time()
    for item in work:
        make_clip(item, resolution)
    return len(work) / (time.process_time() - begin)


def _decoder_clip(work: Work, resolution: int) -> torch.Tensor:
    frames_THWC = decode_frames(work.payload, work.times, DecodeLimits()).frames_THWC
    return crop(frames_THWC, work.box, resolution, antialias=False)


def _plain_clip(work: Work, resolution: int) -> torch.Tensor:
    """What one would write by hand: seek, decode, convert, stack, crop; no limit, no check."""
    pictures: list[np.ndarray] = []
    with av.open(io.BytesIO(work.payload), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        container.seek(int(work.times[0] * av.time_base), backward=True)
        shown = None
        for frame in container.decode(stream):
            while shown is not None and len(pictures) < len(work.times):
                if (frame.time or 0.0) <= work.times[len(pictures)] + 1e-6:
                    break
                pictures.append(shown.reformat(format="rgb24", threads=1).to_ndarray())
            shown = frame
            if len(pictures) == len(work.times):
                break
        while shown is not None and len(pictures) < len(work.times):
            pictures.append(shown.reformat(format="rgb24", threads=1).to_ndarray())
    return crop(np.stack(pictures), work.box, resolution, antialias=False)


def _loader_clips_per_second(config: DataConfig, plans: Sequence[MicroBatchPlan]) -> float:
    """CPU time from the end of the first micro-batch to the end of the last, both processes."""
    stamps: list[float] = []
    begin = 0.0
    with make_loader(config, plans=plans, collate=_stamped, seed=SEED) as loader:
        for number, batch in enumerate(loader):
            stamps.append(float((batch.text or ("0",))[0] or 0))
            if number == 0:
                begin = time.process_time()
    cpu_seconds = stamps[-1] - stamps[0] + time.process_time() - begin
    return (len(plans) - 1) * MICRO_BATCH / cpu_seconds


def _stamped(clips: Sequence[Clip], plan: MicroBatchPlan) -> ClipBatch:
    """A micro-batch that tells the CPU time its worker had spent when it was ready."""
    batch = collate_plan(clips, plan, seed=SEED)
    return replace(batch, text=(str(time.process_time()),))


def _wall_clips_per_second(
    config: DataConfig, plans: Sequence[MicroBatchPlan], workers: int
) -> float:
    config = config.model_copy(update={"workers": workers})
    collate = partial(collate_plan, seed=SEED)
    with make_loader(config, plans=plans, collate=collate, seed=SEED) as loader:
        next(loader)
        begin = time.monotonic()
        num_rest = sum(len(batch.keys) for batch in loader)
        return num_rest / (time.monotonic() - begin)


if __name__ == "__main__":
    raise SystemExit(main())
