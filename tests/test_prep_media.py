"""Sources that are fetched: what arrives is what was listed, or is refused."""

import hashlib
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from data_prep import media
from data_prep.records import Source
from pipeline.data.badmedia import BadMediaError


@pytest.mark.parametrize("listed", [24, 26])
def test_a_transfer_that_ends_early_or_never_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: int
) -> None:
    monkeypatch.setattr(media, "_PAUSES_SECONDS", (0.0,))
    address = "memory://transfer/a.mp4"
    fsspec.filesystem("memory").pipe(address, b"x" * 25)
    whole = Source(name="a.mp4", locator=address, num_bytes=25, modified_ns=1)
    with media.opened(whole, tmp_path) as file:
        assert file.sha256 == hashlib.sha256(b"x" * 25).hexdigest()
    other = replace(whole, num_bytes=listed)
    with (
        pytest.raises(BadMediaError, match=f"expected {listed} bytes, got 25"),
        media.opened(other, tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())
