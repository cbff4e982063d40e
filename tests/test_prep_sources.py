"""Which videos there are and which share a shard: a function of names and sizes alone."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.part import sample_key
from data_prep.settings import PrepSettings
from data_prep.sources import Source, inputs_digest, list_sources, partition
from pipeline.data.layout import KEY_PATTERN
from pipeline.errors import UsageError


def touch(path: Path, num_bytes: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * num_bytes)
    return path


def test_a_folder_gives_its_videos_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2.mp4", "b/10.MP4", "a.webm", "Z.mov", "-dash.mkv", "é.mp4"):
        touch(tmp_path / name)
    for name in ("labels.json", "a.txt", ".hidden.mp4", ".git/x.mp4"):
        touch(tmp_path / name)
    found = list_sources([tmp_path])
    names = [source.name for source in found.sources]
    assert names == ["-dash.mkv", "Z.mov", "a.webm", "b/10.MP4", "b/2.mp4", "é.mp4"]
    assert found.num_ignored == 2
    assert [Path(source.path).stat().st_size for source in found.sources] == [1] * 6


def test_several_folders_keep_their_names_and_a_named_file_needs_no_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "one" / "x.mp4")
    touch(tmp_path / "two" / "x.mp4")
    single = touch(tmp_path / "clip.bin")
    found = list_sources([tmp_path / "two", tmp_path / "one", single])
    assert [source.name for source in found.sources] == ["clip.bin", "one/x.mp4", "two/x.mp4"]


def test_names_that_collide_or_no_video_at_all_are_usage_errors(tmp_path: Path) -> None:
    touch(tmp_path / "one" / "v" / "x.mp4")
    touch(tmp_path / "two" / "v" / "x.mp4")
    with pytest.raises(UsageError, match=r"both be called 'v/x\.mp4'"):
        list_sources([tmp_path / "one" / "v", tmp_path / "two" / "v"])
    touch(tmp_path / "empty" / "notes.txt")
    with pytest.raises(UsageError, match=r"no video found in .*1 other files"):
        list_sources([tmp_path / "empty"])
    with pytest.raises(UsageError, match="no such file or folder"):
        list_sources([tmp_path / "absent"])


def test_a_file_name_that_is_no_text_is_still_listed(tmp_path: Path) -> None:
    touch(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")))
    (source,) = list_sources([tmp_path]).sources
    assert source.name == "caf\\xe9.mp4"
    assert Path(source.path).read_bytes() == b"x"


sources_strategy = st.lists(st.integers(0, 3 * 2**20), min_size=1, max_size=60).map(
    lambda sizes: tuple(
        Source(name=f"{number:03d}", path="", num_bytes=size, modified_ns=0)
        for number, size in enumerate(sizes)
    )
)


@given(sources=sources_strategy, videos=st.integers(1, 20), mib=st.floats(0.1, 10))
def test_parts_hold_every_source_once_in_order_within_their_limits(
    sources: tuple[Source, ...], videos: int, mib: float
) -> None:
    settings = PrepSettings(videos_per_shard=videos, shard_mib=mib)
    parts = partition(sources, settings)
    assert tuple(source for part in parts for source in part) == sources
    for part in parts:
        assert 1 <= len(part) <= videos
        assert len(part) == 1 or sum(source.num_bytes for source in part) <= mib * 2**20


@given(name=st.text(min_size=1, max_size=200), segment=st.integers(0, 9999))
def test_any_file_name_gives_a_key_that_a_shard_can_hold(name: str, segment: int) -> None:
    name = name.encode("utf-8", "backslashreplace").decode()
    key = sample_key(name, segment)
    assert KEY_PATTERN.fullmatch(key)
    assert key != sample_key(name + "x", segment)
    assert key != sample_key(name, segment + 1)


def test_any_other_setting_or_source_changes_the_inputs_digest() -> None:
    source = Source(name="a", path="/x/a", num_bytes=5, modified_ns=7)
    base = inputs_digest([source], PrepSettings())
    moved = Source(name="a", path="/y/a", num_bytes=5, modified_ns=7)
    assert inputs_digest([moved], PrepSettings()) == base
    touched = Source(name="a", path="/x/a", num_bytes=5, modified_ns=8)
    others = [
        inputs_digest([touched], PrepSettings()),
        inputs_digest([source, touched], PrepSettings()),
        *(inputs_digest([source], settings) for settings in one_change_each()),
    ]
    assert len({base, *others}) == len(others) + 1


def one_change_each() -> list[PrepSettings]:
    return [
        PrepSettings(short_side=288),
        PrepSettings(fps="native"),
        PrepSettings(mode="copy"),
        PrepSettings(min_seconds=2.0),
        PrepSettings(max_seconds=16.0),
        PrepSettings(crf=20),
        PrepSettings(gop_frames=8),
        PrepSettings(videos_per_shard=7),
    ]


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        PrepSettings(short_side=4, crf=99, min_seconds=5, max_seconds=2)
    for flag in ("--short-side", "--crf", "--max-seconds"):
        assert flag in str(caught.value)
