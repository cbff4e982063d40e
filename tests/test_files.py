"""A file is the old one or the new one, and a failed write leaves nothing behind."""

import hashlib
import os
from pathlib import Path

import pytest

from pipeline import files


def test_a_write_replaces_the_whole_content_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "note"
    files.write_atomically(path, "a longer first text")
    files.write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_content_is_synchronised_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        sync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        done.append("named")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    files.write_atomically(tmp_path / "note", "x")
    assert done[0].startswith(".note.")
    assert done[1:] == ["named", tmp_path.name]


def test_a_failed_write_raises_and_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "note"
    files.write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_the_digest_is_that_of_the_content(tmp_path):
    path = tmp_path / "block"
    content = bytes(range(256)) * 20_000
    path.write_bytes(content)
    assert files.sha256_of(path) == hashlib.sha256(content).hexdigest()
