"""Copies are found, different clips are not, and the earliest always stays."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.duplicates import NONE, exact_duplicates, mean_bits, near_duplicates
from data_prep.hashes import from_text
from data_prep.measure import measure
from data_prep.settings import PrepSettings
from data_prep.synthetic.dataset import SyntheticConfig, write_dataset

VIDEOS = Path(__file__).parent / "data" / "videos"
SETTINGS = PrepSettings()


def copied(path: Path, *, width: int, height: int, fps: int, crf: int, light: int = 0) -> bytes:
    """A video encoded again, scaled, brightened and at another rate."""
    buffer = io.BytesIO()
    with av.open(str(path)) as source, av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        shown = [(f.time, f) for f in source.decode(source.streams.best("video"))]
        start, number = shown[0][0], 0
        for place in range(int((shown[-1][0] - start) * fps)):
            while number + 1 < len(shown) and shown[number + 1][0] - start <= place / fps:
                number += 1
            small = shown[number][1].reformat(width=width, height=height, format="rgb24")
            lit = np.clip(small.to_ndarray().astype(int) + light, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(lit, format="rgb24")
            frame.pts, frame.time_base = place, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def hashes_of(video: Path | bytes) -> np.ndarray:
    found = measure(video, SETTINGS)
    return from_text(found.figures(*found.shots[0]).hashes)


@pytest.fixture(scope="module")
def originals() -> dict[str, np.ndarray]:
    names = ("carphone_qcif.mp4", "bikes_640x272.mp4", "av1_540p_15s.mp4", "av1_no_duration.mkv")
    return {name: hashes_of(VIDEOS / name) for name in names}


@pytest.mark.parametrize(
    "change",
    [
        {"width": 176, "height": 144, "fps": 30, "crf": 34},
        {"width": 96, "height": 80, "fps": 30, "crf": 23},
        {"width": 176, "height": 144, "fps": 30, "crf": 20, "light": 25},
        {"width": 176, "height": 144, "fps": 15, "crf": 23},
    ],
    ids=["re-encoded", "re-scaled", "brighter", "slower rate"],
)
def test_copies_are_found(originals: dict[str, np.ndarray], change: dict[str, int]) -> None:
    copy = hashes_of(copied(VIDEOS / "carphone_qcif.mp4", **change))
    rows = np.stack([*originals.values(), copy])
    assert near_duplicates(rows, np.arange(len(rows)), SETTINGS.near_bits).tolist() == [
        *[NONE] * 4,
        0,
    ]


def test_different_clips_of_the_same_kind_are_not_duplicates(tmp_path: Path) -> None:
    config = SyntheticConfig(videos=24, validation=2, test=2, pairs=2, size=64, seconds=2.0)
    write_dataset(tmp_path, config, workers=1)
    rows = np.stack([hashes_of(path) for path in sorted((tmp_path / "videos").glob("*.mp4"))])
    assert (near_duplicates(rows, np.arange(len(rows)), SETTINGS.near_bits) == NONE).all()


def noisy(rows: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """The same hashes with some bits of each turned over."""
    generator = np.random.default_rng(seed)
    for _ in range(bits):
        place = generator.integers(0, 64, size=rows.shape).astype(np.uint64)
        rows = rows ^ (np.uint64(1) << place)
    return rows


def random_rows(number: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 2**64, size=(number, 8), dtype=np.uint64)


def test_the_banded_search_finds_what_a_comparison_of_all_pairs_finds() -> None:
    rows = random_rows(300, seed=1)
    rows = np.concatenate([rows, noisy(rows[:100], 3, seed=2), noisy(rows[50:90], 4, seed=3)])
    found = near_duplicates(rows, np.arange(len(rows)), 6.0)
    for number in range(len(rows)):
        kept = [n for n in range(number) if found[n] == NONE]
        alike = [n for n in kept if mean_bits(rows[number : number + 1], rows[n : n + 1])[0] <= 6]
        assert found[number] == (alike[0] if alike else NONE)


def test_the_earliest_of_many_copies_stays() -> None:
    rows = np.concatenate([random_rows(5, seed=4), np.repeat(random_rows(1, seed=5), 200, axis=0)])
    assert near_duplicates(rows, np.arange(205), 6.0).tolist() == [NONE] * 6 + [5] * 199
    # Of one source nothing is a copy: a quiet scene looks alike throughout.
    assert (near_duplicates(rows, np.zeros(205, np.int64), 6.0) == NONE).all()


def test_pictures_that_show_nothing_prove_nothing() -> None:
    rows = np.zeros((4, 8), np.uint64)
    rows[:2, :3] = random_rows(1, seed=6)[0, :3]
    assert (near_duplicates(rows, np.arange(4), 6.0) == NONE).all()
    rows[:2, 3] = 77
    assert near_duplicates(rows, np.arange(4), 6.0).tolist() == [NONE, 0, NONE, NONE]


def test_exact_duplicates_name_the_first_with_the_same_digest() -> None:
    digests = np.array(["c", "a", "c", "b", "a", "c"])
    assert exact_duplicates(digests).tolist() == [NONE, NONE, 0, NONE, 1, 0]
    assert exact_duplicates(np.array([], dtype="U64")).tolist() == []
