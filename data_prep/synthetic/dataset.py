"""Writing a synthetic data set: resumable, and the same bytes at any number of workers.

A video appears under its final name only when it is whole, and the label files come last. So a
second run with the same parameters writes what is missing and touches nothing else, and a folder
without `labels/train.json` is an unfinished one.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.synthetic.annotations import (
    Annotation,
    answer_file,
    id_file,
    label_file,
    split_file,
)
from data_prep.synthetic.classes import PAIRS
from data_prep.synthetic.knobs import ClipShape
from data_prep.synthetic.scene import draw_scene
from data_prep.synthetic.videos import Recipe, is_written, write_videos
from pipeline.errors import StorageError, UsageError

RENDERER_VERSION = 2
"""Raised whenever the same parameters would give other pictures."""

_PARAMETERS = "synthetic.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """What a synthetic data set consists of; the same values give the same bytes."""

    videos: int = 600
    """Videos of the training split."""
    validation: int = 200
    """Videos of the validation split."""
    test: int = 20
    """Videos of the test split."""
    seed: int = 0
    """What everything is drawn from."""
    size: int = 112
    """Picture side in pixels; even."""
    seconds: float = 2.5
    """Length of a clip."""
    fps: int = 12
    """Frames per second."""
    pairs: int = 6
    """Pairs of classes that are each other's reversal."""
    difficulty: float = 0.3
    """0 is large, plain motion before a still background; 1 is small motion in a restless one."""

    def __post_init__(self) -> None:
        wrong = [message for holds, message in self._rules() if not holds]
        if wrong:
            raise UsageError("; ".join(wrong) + ".", remedy="See `jepa prep synthetic --help`.")

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        return (
            (self.videos >= 1, f"--videos must be at least 1, got {self.videos}"),
            (self.validation >= 0, f"--validation must not be negative, got {self.validation}"),
            (self.test >= 0, f"--test must not be negative, got {self.test}"),
            (self.seed >= 0, f"--seed must not be negative, got {self.seed}"),
            (
                self.size % 2 == 0 and 32 <= self.size <= 1024,
                f"--size must be an even number from 32 to 1024, got {self.size}",
            ),
            (1 <= self.fps <= 120, f"--fps must be from 1 to 120, got {self.fps}"),
            (
                2 <= self.seconds * self.fps <= 1000,
                f"--seconds times --fps must be 2 to 1000 frames, got {self.seconds * self.fps:g}",
            ),
            (
                1 <= self.pairs <= len(PAIRS),
                f"--pairs must be from 1 to {len(PAIRS)}, got {self.pairs}",
            ),
            (
                0 <= self.difficulty <= 1,
                f"--difficulty must be from 0 to 1, got {self.difficulty}",
            ),
        )

    @property
    def recipe(self) -> Recipe:
        """What a video number is rendered with."""
        shape = ClipShape(
            size=self.size, seconds=self.seconds, fps=self.fps, difficulty=self.difficulty
        )
        return Recipe(seed=self.seed, num_pairs=self.pairs, shape=shape)

    def splits(self) -> dict[str, range]:
        """Video numbers of each split, one after the other.

        A split starts where a new round of all classes starts, so that within every split no
        class has more than one video more than another.
        """
        splits, start = {}, 1
        for name, count in (
            ("train", self.videos),
            ("validation", self.validation),
            ("test", self.test),
        ):
            splits[name] = range(start, start + count)
            start += math.ceil(count / (2 * self.pairs)) * 2 * self.pairs
        return splits


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticReport:
    """What one call did."""

    folder: str
    num_written: int
    num_kept: int
    """Videos that were there already."""
    num_classes: int


def write_dataset(
    out: Path,
    config: SyntheticConfig,
    *,
    workers: int = 2,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> SyntheticReport:
    """Write videos, label files, parameters and a contact sheet below `out`.

    Args:
        out: Folder; made if missing.
        config: What to write.
        workers: Processes that render.
        overwrite: Replace a synthetic data set of other parameters that stands in `out`.
        on_progress: Called with (videos done, videos in total).

    Raises:
        UsageError: `out` holds something else, or a data set of other parameters.
        StorageError: The file system refused, or a rendering process was killed.
    """
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}.")
    try:
        _claim(out, config, overwrite)
        folder = out / "videos"
        folder.mkdir(exist_ok=True)
        numbers = [video for split in config.splits().values() for video in split]
        missing = [video for video in numbers if not is_written(folder, video)]
        done = len(numbers) - len(missing)
        for count in write_videos(folder, missing, config.recipe, workers):
            done += count
            if on_progress is not None:
                on_progress(done, len(numbers))
        _write_sheet_if_missing(out / "classes.png", config)
        _write_labels(out / "labels", config)
    except OSError as error:
        raise StorageError(f"Writing the synthetic data set in {out} failed: {error}") from error
    except BrokenProcessPool as error:
        raise StorageError(
            "A rendering process was killed, most likely for want of memory.",
            remedy="Run the same command again with fewer --workers; it continues.",
        ) from error
    return SyntheticReport(
        folder=str(out),
        num_written=len(missing),
        num_kept=len(numbers) - len(missing),
        num_classes=2 * config.pairs,
    )


def _claim(out: Path, config: SyntheticConfig, overwrite: bool) -> None:
    """Make the folder this data set's, or refuse."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; a folder is needed.", remedy="Choose another name.")
    out.mkdir(parents=True, exist_ok=True)
    wanted = {"renderer_version": RENDERER_VERSION, **asdict(config)}
    written = _read_parameters(out)
    if written == wanted:
        return
    if written is not None and not overwrite:
        changed = ", ".join(
            f"{key} {written.get(key)} there and {wanted.get(key)} asked"
            for key in sorted(wanted.keys() | written.keys())
            if written.get(key) != wanted.get(key)
        )
        raise UsageError(
            f"{out} holds a synthetic data set of other parameters: {changed}.",
            remedy="Choose another folder, or add --overwrite to replace that data set.",
        )
    _remove_old(out)
    _replace(out / _PARAMETERS, json.dumps(wanted, indent=1) + "\n")


def _read_parameters(out: Path) -> dict[str, Any] | None:
    path = out / _PARAMETERS
    if not path.exists():
        if any(out.iterdir()):
            raise UsageError(
                f"{out} is not empty and holds no {_PARAMETERS}: it is no synthetic data set.",
                remedy="Choose an empty or a new folder.",
            )
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{path} is not JSON: {error}.", remedy="Remove that folder and run again."
        ) from error


def _remove_old(out: Path) -> None:
    """Remove an older data set's files before the new parameters are written.

    In that order an interruption leaves the old data set with files missing, which a run with
    the old parameters would mend, and never the new parameters beside old videos.
    """
    for pattern in ("labels/*.json", "labels/test-answers.csv", "classes.png", "videos/*.mp4"):
        for path in out.glob(pattern):
            path.unlink()


def _write_labels(folder: Path, config: SyntheticConfig) -> None:
    folder.mkdir(exist_ok=True)
    entries = {
        name: [_annotate(video, config.recipe) for video in videos]
        for name, videos in config.splits().items()
    }
    _replace(folder / "labels.json", label_file(config.pairs))
    _replace(folder / "validation.json", split_file(entries["validation"]))
    _replace(folder / "test.json", id_file(entries["test"]))
    _replace(folder / "test-answers.csv", answer_file(entries["test"]))
    _replace(folder / "train.json", split_file(entries["train"]))


def _annotate(video: int, recipe: Recipe) -> Annotation:
    scene = draw_scene(recipe.seed, video, recipe.num_pairs, recipe.shape)
    return Annotation(
        video=video,
        template=scene.template,
        sentence=scene.sentence,
        placeholders=scene.placeholders,
    )


def _write_sheet_if_missing(path: Path, config: SyntheticConfig) -> None:
    if path.exists():
        return
    # Matplotlib takes a second to import, which only the run that draws the sheet should pay.
    from data_prep.synthetic.sheet import write_sheet  # noqa: PLC0415

    partial = path.with_name(f".{path.name}.partial")
    recipe = config.recipe
    write_sheet(partial, seed=recipe.seed, num_pairs=recipe.num_pairs, shape=recipe.shape)
    partial.replace(path)


def _replace(path: Path, text: str) -> None:
    """Write a text file in one step, and not at all if it already holds the same."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
