"""The figures of a manifest, counted as records go by, and the card that shows them."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.card import card_text
from data_prep.figures import figures_of
from data_prep.records import ItemRecord, SegmentFigures, SegmentRecord
from pipeline.data.layout import Manifest, ShardEntry
from pipeline.data.manifest import manifest_text
from pipeline.errors import StorageError
from tests.prep import run_prep, visible_files
from tests.test_decode_frames import grid_video
from tests.test_prep_item import SMALL, run_here


def record(number: int, lengths: tuple[float, ...], motion: float = 12.0) -> ItemRecord:
    figures = SegmentFigures(motion=motion, black_share=0.0, still_share=0.3, hashes=())
    segments = tuple(
        SegmentRecord(
            number=place, key=f"k{number}-{place}", start_seconds=1.0, end_seconds=1.0 + length,
            num_frames=8, fps=8.0, width=512, height=384, num_bytes=10, video_sha256="0" * 64,
            content_sha256="1" * 64,            figures=figures,
        )
        for place, length in enumerate(lengths)
    )  # fmt: skip
    codec = "h264" if lengths else ""
    return ItemRecord(
        source=f"{number}.mp4", seconds=30.0, codec=codec, fps=29.97, width=1280, height=720,
        segments=segments,
    )  # fmt: skip


def binned(figures: dict, name: str) -> dict[float, int]:
    histogram = figures["histograms"][name]
    counted = zip(histogram["edges"], histogram["counts"], strict=True)
    return {edge: count for edge, count in counted if count}


def test_sources_and_segments_are_counted_where_a_person_looks_for_them() -> None:
    records = [record(0, (3.9999, 20.0)), record(1, (4.0,), motion=500.0), record(2, ())]
    figures = figures_of(records)
    assert (figures["sources"], figures["sources_used"]) == (3, 2)
    assert figures["source_hours"] == pytest.approx(0.025)
    assert figures["source_codecs"] == {"h264": 2}
    assert binned(figures, "seconds") == {4: 2, 16: 1}
    assert binned(figures, "motion") == {10: 2, 160: 1}
    assert binned(figures, "source_fps") == {25: 2}
    assert binned(figures, "source_short_side") == {720: 2}
    assert binned(figures, "still_share") == {0.25: 3}


def test_memory_does_not_grow_with_the_number_of_records() -> None:
    one = record(0, (5.0,))

    def many(number: int) -> Iterator[ItemRecord]:
        return (one for _ in range(number))

    peaks = []
    for number in (1_000, 20_000):
        tracemalloc.start()
        figures_of(many(number))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000


def manifest(**changes) -> Manifest:
    shards = (ShardEntry(name="shard-000000.tar", bytes=2**20, sha256="a" * 64, num_samples=3),)
    return Manifest(
        digest="d" * 64, index_sha256="b" * 64, num_samples=3, hours=0.01,
        members=("video", "sidecar"), shards=shards, **changes,
    )  # fmt: skip


def test_figures_go_into_the_manifest_and_older_manifests_stay_as_they_were() -> None:
    assert b"figures" not in manifest_text(manifest())
    figures = figures_of([record(0, (5.0,))])
    text = manifest_text(manifest(figures=figures))
    assert Manifest.model_validate_json(text).figures == figures


def test_the_card_says_what_how_many_how_made_and_how_to_read() -> None:
    figures = figures_of([record(0, (5.0, 6.0, 7.0))])
    made = manifest(figures=figures, preparation={"fps": 8.0, "mode": "transcode"})
    text = card_text(made, {"black": 2, "too short": 1}, terms="From a | b, CC BY 4.0.")
    for part in ("| samples | 3 |", "| mode | transcode |", "| black | 2 |", "CC BY 4.0", "d" * 64):
        assert part in text
    assert 'webdataset.WebDataset("shard-000000.tar"' in text
    assert "| 4 to 8 | 3 |" in text
    assert text == card_text(made, {"too short": 1, "black": 2}, terms="From a | b, CC BY 4.0.")
    assert "None was given" in card_text(manifest(), {})


def test_terms_in_the_folder_go_onto_the_card_with_the_next_run_and_change_nothing_else(
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "a.mp4", tmp_path / "dataset"
    source.write_bytes(grid_video(num_frames=120))
    run_here(out, source)
    before = visible_files(out)
    terms = "From the | lab's archive, CC BY 4.0."
    (out / "TERMS.md").write_text(f"\ufeff{terms}\n")
    run_prep(source, out=out, settings=SMALL)
    after = visible_files(out)
    assert terms in after.pop("README.md").decode()
    assert "None was given" in before.pop("README.md").decode()
    del after["TERMS.md"]
    assert after == before
    (out / "TERMS.md").write_bytes(b"\xff")
    with pytest.raises(StorageError, match=r"TERMS\.md: cannot be read as UTF-8"):
        run_prep(source, out=out, settings=SMALL)
    (out / "TERMS.md").unlink()
    run_prep(source, out=out, settings=SMALL)
    assert terms not in (out / "README.md").read_text()
