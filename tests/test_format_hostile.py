"""Tars that are damaged or mean harm are refused by name, and nothing of them is ever written."""

import io
import tarfile
from pathlib import Path

import pytest

from pipeline.data.indexing import build_index, index_shard
from pipeline.errors import DataError, UsageError
from tests.test_format_index import members_of, random_sample, write_tar


def add(tar: tarfile.TarFile, name: str, content: bytes = b"x", kind: bytes | None = None) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content) if kind is None else 0
    if kind is not None:
        info.type, info.linkname = kind, "/etc/passwd"
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../escape.mp4", None),
        ("/tmp/absolute.mp4", None),  # noqa: S108
        ("folder/inside.mp4", None),
        ("clip.exe", None),
        ("clip.MP4", None),
        ("-rf.mp4", None),
        ("a" * 65 + ".mp4", None),
        ("clip.mp4", tarfile.SYMTYPE),
        ("clip.mp4", tarfile.LNKTYPE),
        ("clip.mp4", tarfile.CHRTYPE),
        ("clip.mp4", tarfile.FIFOTYPE),
        ("clip.mp4", tarfile.DIRTYPE),
        ("clip\n.mp4", None),
    ],
)
def test_a_hostile_member_is_refused_with_its_name(
    tmp_path: Path, name: str, kind: bytes | None
) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, name, kind=kind)
    with pytest.raises(DataError) as caught:
        index_shard(path)
    assert repr(name)[1:-1] in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.tar"]


def test_a_key_or_member_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_tar(path, [members_of("a", b"1"), members_of("b", b"2"), members_of("a", b"3")])
    with pytest.raises(DataError, match="key 'a' occurs twice"):
        index_shard(path)
    with tarfile.open(path, "w") as tar:
        add(tar, "a.mp4")
        add(tar, "a.mp4")
    with pytest.raises(DataError, match=r"member 'a\.mp4' occurs twice"):
        index_shard(path)


@pytest.mark.parametrize("missing", ["json", "mp4"])
def test_a_sample_without_video_or_sidecar_is_refused(tmp_path: Path, missing: str) -> None:
    sample = members_of("a", b"1", **{"times.npy": b"x"})
    del sample[missing]
    write_tar(tmp_path / "s.tar", [sample])
    with pytest.raises(DataError, match=f"sample 'a' has no {missing}"):
        index_shard(tmp_path / "s.tar")


def test_a_sidecar_of_another_video_is_refused(tmp_path: Path) -> None:
    sample = members_of("a", b"1") | {"mp4": b"2"}
    write_tar(tmp_path / "s.tar", [sample])
    with pytest.raises(DataError, match="describes another video"):
        index_shard(tmp_path / "s.tar")


def test_no_damaged_header_ends_a_shard_silently(tmp_path: Path) -> None:
    """tarfile takes a damaged header in the middle for the end and reports half the samples."""
    path = tmp_path / "s.tar"
    write_tar(path, [random_sample(number) for number in range(4)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [info.offset for info in tar][1:]
    for offset in headers:
        damaged = bytearray(whole)
        damaged[offset + 5] ^= 0xFF
        path.write_bytes(damaged)
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) < 20
        with pytest.raises(DataError, match="does not end there"):
            index_shard(path)


@pytest.mark.parametrize("length", [0, 100, 512, 3000, 5000, -1024, -10])
def test_a_tar_cut_off_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "s.tar"
    write_tar(path, [random_sample(number) for number in range(4)])
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1]
    content_end = end.offset_data + -(-end.size // 512) * 512
    whole = path.read_bytes()[: content_end + 1024]
    path.write_bytes(whole[:length] if length >= 0 else whole[: len(whole) + length])
    with pytest.raises(DataError, match=str(path)):
        index_shard(path)


def test_bytes_after_the_end_of_a_tar_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_tar(path, [random_sample(0)])
    with path.open("ab") as file:
        file.write(b"\0" * 2_000_000 + b"hidden")
    with pytest.raises(DataError, match="does not end there"):
        index_shard(path)


def test_a_folder_without_shards_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no shard"):
        build_index(tmp_path)
