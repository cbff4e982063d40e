"""One video number → one file, and many of them over several processes."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from data_prep.synthetic.encode import encode_h264
from data_prep.synthetic.knobs import ClipShape
from data_prep.synthetic.render import render
from data_prep.synthetic.scene import draw_scene

# Enough that handing out a task costs nothing, few enough that Ctrl-C waits under two seconds.
_VIDEOS_PER_TASK = 16
_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a video number is turned into a clip with."""

    seed: int
    num_pairs: int
    shape: ClipShape


def write_video(folder: Path, video: int, recipe: Recipe) -> None:
    """Render one video and put it under its final name when it is whole."""
    scene = draw_scene(recipe.seed, video, recipe.num_pairs, recipe.shape)
    payload = encode_h264(render(scene, recipe.shape), recipe.shape.fps)
    partial = folder / f".{video}.{os.getpid()}{_PARTIAL}"
    partial.write_bytes(payload)
    partial.replace(video_path(folder, video))


def video_path(folder: Path, video: int) -> Path:
    """Where a video stands once it is whole."""
    return folder / f"{video}.mp4"


def is_written(folder: Path, video: int) -> bool:
    """True if a video stands whole; a crash of the machine can leave an empty file behind."""
    path = video_path(folder, video)
    return path.exists() and path.stat().st_size > 0


def write_videos(
    folder: Path, videos: Sequence[int], recipe: Recipe, workers: int
) -> Iterator[int]:
    """Write videos in any order over `workers` processes; yields how many are new each time.

    One worker means this process itself. If the caller stops early (an interrupt, an error), the
    tasks not yet begun are dropped, and no unfinished file stays behind.
    """
    tasks = [
        videos[first : first + _VIDEOS_PER_TASK]
        for first in range(0, len(videos), _VIDEOS_PER_TASK)
    ]
    try:
        if workers == 1:
            yield from (_write_task(folder, task, recipe) for task in tasks)
        else:
            yield from _in_processes(folder, tasks, recipe, workers)
    finally:
        for leftover in folder.glob(f".*{_PARTIAL}"):
            leftover.unlink(missing_ok=True)


def _in_processes(
    folder: Path, tasks: Sequence[Sequence[int]], recipe: Recipe, workers: int
) -> Iterator[int]:
    # Spawned, not forked: the caller may hold threads of torch or Ray.
    pool = ProcessPoolExecutor(
        min(workers, max(1, len(tasks))),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_interrupts_to_the_parent,
    )
    try:
        futures = [pool.submit(_write_task, folder, task, recipe) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_task(folder: Path, videos: Sequence[int], recipe: Recipe) -> int:
    for video in videos:
        write_video(folder, video, recipe)
    return len(videos)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
