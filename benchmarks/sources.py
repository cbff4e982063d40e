"""Clips per CPU second from our shards, from the raw originals, and from a list of paths.

    shards    our loader on what `jepa prep run` makes of the videos
    raw       our loader on the originals in a tar, as `jepa prep index` reads them
    paths     a loader shaped like the official one: a list of paths, the whole file opened for each
              clip, frames by number, converted whole, cropped and normalised as floats

All decode in this process with one thread, in rounds that take turns. `paths` uses decord where
it is installed, and PyAV in the same shape elsewhere.
Run: python -m benchmarks.sources --videos A.mp4 B.mp4
"""

import argparse
import importlib
import importlib.util
import math
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.result import print_table, spread, write_result
from benchmarks.shards import REAL_NAMES, REAL_VIDEOS
from data_prep.adopt import index_tars
from data_prep.driver import Workers
from data_prep.prepare import Inputs, prepare
from data_prep.settings import PrepSettings
from pipeline.clip import Grid, MicroBatchPlan
from pipeline.data.loader import make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.masks.blocks import MaskConfig
from pipeline.masks.collate import collate_plan

_FRAMES, _FPS, _SIZE, _BATCH = 16, 4, 256, 4
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1) * 255
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1) * 255


def main() -> int:
    """Measure, print a table, write benchmarks/results/sources.json."""
    arguments = _arguments()
    torch.set_num_threads(1)
    videos = arguments.videos or [REAL_VIDEOS / name for name in REAL_NAMES]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        ways = _ways(root, videos, arguments.clips)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        # Imports and files that are read for the first time belong to no way.
        for way in ways.values():
            way()
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                rates[name].append(_clips_per_cpu_second(way))
    figures = {f"{name}, clips per CPU second": spread(found) for name, found in rates.items()}
    for one, other in (("shards", "raw"), ("shards", "paths"), ("raw", "paths")):
        pairs = zip(rates[one], rates[other], strict=True)
        figures[f"{one} to {other}"] = spread([a / b for a, b in pairs], digits=3)
    rows = [(name, *values.values()) for name, values in figures.items()]
    print_table("Loading from shards, originals and paths", ("", "median", "min", "max"), rows)
    settings = {
        "videos": [path.name for path in videos],
        "clips": arguments.clips,
        "rounds": arguments.rounds,
        "paths decoder": "decord" if _has_decord() else "PyAV",
    }
    print(f"written to {write_result('sources', figures, settings)}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--videos", type=Path, nargs="+", help="MP4 files; 720p for the goals")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def _ways(root: Path, videos: Sequence[Path], clips: int) -> dict[str, Callable[[], int]]:
    inputs = Inputs(arguments=tuple(f"file:{path}" for path in videos))
    settings = PrepSettings(cut="stride")
    prepare(inputs, root / "shards", settings, workers=Workers(num_cpus=2))
    (root / "raw").mkdir()
    with tarfile.open(root / "raw" / "raw.tar", "w") as tar:
        for number, path in enumerate(videos):
            tar.add(path, arcname=f"{number:06d}{path.suffix}")
    index_tars(root / "raw", root / "raw")
    return {
        "shards": partial(_through_loader, root / "shards", clips),
        "raw": partial(_through_loader, root / "raw", clips),
        "paths": partial(_through_paths, videos, clips),
    }


def _clips_per_cpu_second(way: Callable[[], int]) -> float:
    begin = time.process_time()
    clips = way()
    return clips / (time.process_time() - begin)


def _through_loader(dataset: Path, clips: int) -> int:
    config = DataConfig(sources=(Source(path=str(dataset)),), workers=0)
    plans = tuple(
        MicroBatchPlan(
            step=number + 1,
            stage=0,
            first_position=number * _BATCH,
            size=_BATCH,
            frames=_FRAMES,
            fps=float(_FPS),
            resolution=_SIZE,
            masks=MaskConfig(),
            grid=Grid(t=_FRAMES // 2, h=_SIZE // 16, w=_SIZE // 16),
        )
        for number in range(math.ceil(clips / _BATCH))
    )
    collate = partial(collate_plan, seed=1)
    with make_loader(config, plans=plans, collate=collate, seed=1) as loader:
        return sum(len(batch.keys) for batch in loader)


def _through_paths(videos: Sequence[Path], clips: int) -> int:
    generator = np.random.default_rng(0)
    load = _decord_frames if _has_decord() else _av_frames
    made = []
    for number in range(clips):
        frames_THWC = load(videos[number % len(videos)], generator)
        made.append(_cropped(torch.from_numpy(frames_THWC), generator))
        if len(made) == _BATCH:
            torch.stack(made)
            made = []
    return clips


def _indices(num_frames: int, fps: float, generator: np.random.Generator) -> np.ndarray:
    """Frame numbers by the official rule: a stride of whole frames, the window anywhere."""
    window = _FRAMES * max(1, math.ceil(fps) // _FPS)
    if num_frames <= window:
        return np.linspace(0, num_frames - 1, _FRAMES).astype(int)
    end = int(generator.integers(window, num_frames))
    return np.linspace(end - window, end - 1, _FRAMES).astype(int)


def _has_decord() -> bool:
    return importlib.util.find_spec("decord") is not None


def _decord_frames(path: Path, generator: np.random.Generator) -> np.ndarray:
    decord = importlib.import_module("decord")
    reader = decord.VideoReader(str(path), num_threads=1, ctx=decord.cpu(0))
    return reader.get_batch(_indices(len(reader), reader.get_avg_fps(), generator)).asnumpy()


def _av_frames(path: Path, generator: np.random.Generator) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        fps = float(stream.average_rate or 30)
        numbers = _indices(stream.frames or int(fps), fps, generator)
        begin = float(numbers[0] / fps)
        container.seek(int(begin * av.time_base), backward=True)
        pictures: dict[int, np.ndarray] = {}
        for frame in container.decode(stream):
            number = round((frame.time or 0.0) * fps)
            if number in numbers:
                pictures[number] = frame.reformat(format="rgb24", threads=1).to_ndarray()
            if number >= numbers[-1]:
                break
    found = sorted(pictures)
    nearest = [found[int(np.abs(np.array(found) - number).argmin())] for number in numbers]
    return np.stack([pictures[number] for number in nearest])


def _cropped(frames_THWC: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Random resized crop of floats, flipped half the time, normalised."""
    video_CTHW = frames_THWC.permute(3, 0, 1, 2).float()
    height, width = video_CTHW.shape[-2:]
    side = int(min(height, width) * math.sqrt(generator.uniform(0.3, 1.0)))
    top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
    part_TCHW = video_CTHW[:, :, top : top + side, left : left + side].transpose(0, 1)
    shrunk = torch.nn.functional.interpolate(part_TCHW, (_SIZE, _SIZE), mode="bilinear")
    clip_CTHW = shrunk.transpose(0, 1)
    if generator.random() < 0.5:
        clip_CTHW = clip_CTHW.flip(-1)
    return (clip_CTHW - _MEAN) / _STD


if __name__ == "__main__":
    raise SystemExit(main())
