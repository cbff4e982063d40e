"""The kept test videos: whole, small, attributed, and what their manifest says they are."""

import csv
import hashlib
import re
from pathlib import Path

import pytest

from pipeline.data.decode import BadMediaError, DecodeLimits, probe_media

DATA = Path(__file__).parent / "data"
with (DATA / "MANIFEST.csv").open(encoding="utf-8", newline="") as _file:
    ROWS = list(csv.DictReader(_file))


def test_manifest_lists_exactly_the_files_that_are_there() -> None:
    for row in ROWS:
        payload = (DATA / "videos" / row["file"]).read_bytes()
        assert (len(payload), hashlib.sha256(payload).hexdigest()) == (
            int(row["bytes"]),
            row["sha256"],
        ), row["file"]
    assert {path.name for path in (DATA / "videos").iterdir()} == {row["file"] for row in ROWS}


def test_collection_stays_under_three_megabytes() -> None:
    assert sum(int(row["bytes"]) for row in ROWS) < 3_000_000


def test_every_file_is_attributed_and_its_licence_text_is_kept() -> None:
    lines = (DATA / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines()
    for row in ROWS:
        (line,) = [line for line in lines if line.startswith(f"| {row['file']} |")]
        assert row["source"] in line
        assert f"| {row['licence']} |" in line
        (text,) = re.findall(r"\S*(?:licences/\S+|LICENSE)", line)
        assert text == "../../LICENSE" or (DATA / text).stat().st_size > 1000


@pytest.mark.parametrize("row", ROWS, ids=[row["file"] for row in ROWS])
def test_the_decoder_meets_what_the_manifest_promises(row: dict[str, str]) -> None:
    source = DATA / "videos" / row["file"]
    if row["expect"] == "reject":
        with pytest.raises(BadMediaError) as caught:
            probe_media(source, DecodeLimits(), decode_everything=True)
        assert str(caught.value.reason) == row["reason"]
        return
    info = probe_media(source, DecodeLimits(), decode_everything=True)
    assert (info.partial is not None) == (row["expect"] == "partial")
    assert (info.codec, info.num_frames) == (row["codec"], int(row["frames"]))
    assert {info.width, info.height} == {int(row["width"]), int(row["height"])}
    assert info.upright == (row["rotation_degrees"] == "0")
    assert info.variable_rate == (row["variable_rate"] == "yes")
    assert info.first_pts_seconds == pytest.approx(float(row["first_pts_seconds"]), abs=1e-3)


def test_every_kind_that_breaks_readers_is_there() -> None:
    reasons = {row["reason"] for row in ROWS}
    assert {"empty", "no video stream", "not a video", "picture too large"} <= reasons
    assert {"undecodable", "too short", "picture too small", "still"} <= reasons
    assert any(float(row["first_pts_seconds"] or 0) < 0 for row in ROWS)
    assert any(float(row["first_pts_seconds"] or 0) > 1 for row in ROWS)
    assert any(row["variable_rate"] == "yes" for row in ROWS)
    assert any(row["rotation_degrees"] not in ("", "0") for row in ROWS)
    assert any(int(row["width"] or 0) % 2 for row in ROWS)
    assert len({row["codec"] for row in ROWS if row["codec"]}) >= 5
    assert sum(row["kind"] == "real" for row in ROWS) >= 4
