"""The shard contract: offsets are the tar's, any damage is noticed, nothing hostile is believed."""

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.format import BadMediaError, BadReason, Member, ShardIndex, Sidecar
from pipeline.data.indexing import build_index
from pipeline.data.layout import INDEX_NAME, MANIFEST_NAME, SUFFIXES, Manifest
from pipeline.data.manifest import dataset_digest, file_sha256
from pipeline.errors import DataError, StorageError, UsageError


def members_of(key: str, video: bytes, **others: bytes) -> dict[str, bytes | str]:
    sidecar = Sidecar(
        key=key,
        source=f"{key}.mp4",
        source_sha256="0" * 64,
        segment_start_seconds=0.0,
        segment_end_seconds=1.0,
        num_frames=8,
        fps=8.0,
        duration_seconds=1.0,
        width=112,
        height=112,
        codec="h264",
        video_bytes=len(video),
        video_sha256=hashlib.sha256(video).hexdigest(),
    )
    return {"__key__": key, "json": sidecar.model_dump_json().encode(), "mp4": video} | others


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes | str]]) -> None:
    with path.open("wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


def random_sample(number: int) -> dict[str, bytes | str]:
    generator = np.random.default_rng(number)
    times = np.cumsum(generator.random(8))
    states = generator.standard_normal((8, 7)).astype(np.float32)
    return members_of(
        f"clip-{number:03d}",
        generator.bytes(500 + number),
        **{"times.npy": npy(times), "states.npy": npy(states), "actions.npy": npy(states[1:])},
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_tar(folder / "shard-000000.tar", [random_sample(number) for number in range(6)])
    write_tar(folder / "shard-000001.tar", [random_sample(number) for number in range(6, 10)])
    build_index(folder)
    return folder


def test_every_member_lies_where_tarfile_says_and_reads_back(dataset: Path) -> None:
    index = ShardIndex.open(dataset)
    seen = 0
    for number in range(len(index)):
        record = index.record(number)
        with tarfile.open(index.shard_path(record)) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                if key != record.key:
                    continue
                member = {text: member for member, text in SUFFIXES.items()}[suffix]
                place = record.place(member)
                assert (place.offset, place.length) == (info.offset_data, info.size)
                assert index.read_member(record, member) == tar.extractfile(info).read()
                seen += 1
    assert seen == 10 * 5


def test_plain_webdataset_reads_the_same_samples_in_the_same_order(dataset: Path) -> None:
    index = ShardIndex.open(dataset)
    shards = [str(dataset / shard.name) for shard in index.manifest.shards]
    plain = list(wds.WebDataset(shards, shardshuffle=False, nodesplitter=None))
    assert [sample["__key__"] for sample in plain] == [index.record(n).key for n in range(10)]
    for number, sample in enumerate(plain):
        assert sample["mp4"] == index.read_member(index.record(number))
        assert sample["states.npy"] == index.read_member(index.record(number), Member.STATES)


def test_optional_arrays_come_back_with_their_values_and_absent_ones_are_named(
    dataset: Path,
) -> None:
    index = ShardIndex.open(dataset)
    record = index.record(3)
    expected = np.random.default_rng(3).random(8).cumsum()
    np.testing.assert_array_equal(index.read_array(record, Member.TIMES), expected)
    assert index.read_array(record, Member.ACTIONS).shape == (7, 7)
    assert index.read_sidecar(record).key == record.key
    with pytest.raises(BadMediaError, match=r"clip-003\.captions\.json") as caught:
        index.read_captions(record)
    assert caught.value.reason is BadReason.MISSING_MEMBER


def test_indexing_again_gives_the_same_bytes_and_another_byte_another_digest(
    dataset: Path,
) -> None:
    first = {name: (dataset / name).read_bytes() for name in (INDEX_NAME, MANIFEST_NAME)}
    digest = ShardIndex.open(dataset).digest
    build_index(dataset)
    assert {name: (dataset / name).read_bytes() for name in first} == first
    write_tar(dataset / "shard-000001.tar", [random_sample(number) for number in range(7, 11)])
    assert build_index(dataset).digest != digest


def test_an_index_pickles_into_a_reader_of_the_same_dataset(dataset: Path) -> None:
    index = ShardIndex.open(dataset)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)  # noqa: S301 - our own, a moment ago
    assert again.read_member(again.record(7)) == index.read_member(index.record(7))


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_stay_bounded_over_many_shards(tmp_path: Path) -> None:
    for number in range(150):
        write_tar(tmp_path / f"s{number:03d}.tar", [members_of(f"k{number}", b"x" * 100)])
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    before = num_descriptors()
    for number in [*range(150), *range(150)]:
        index.read_member(index.record(number))
    assert num_descriptors() - before <= 128
    index.close()
    assert num_descriptors() == before


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_flipped_bit_of_any_member_goes_unnoticed(dataset: Path, data: st.DataObject) -> None:
    index = ShardIndex.open(dataset, verify=False)
    record = index.record(data.draw(st.integers(0, 9)))
    member = data.draw(st.sampled_from([m for m in Member if record.place(m).length]))
    place = record.place(member)
    offset = place.offset + data.draw(st.integers(0, place.length - 1))
    shard = index.shard_path(record)
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1 << data.draw(st.integers(0, 7))
    good = shard.read_bytes()
    try:
        shard.write_bytes(content)
        with pytest.raises(BadMediaError, match=record.key) as caught:
            index.read_member(record, member)
        assert caught.value.reason is BadReason.DAMAGED
    finally:
        shard.write_bytes(good)


def test_a_shard_cut_off_is_refused_at_opening_and_at_reading(dataset: Path) -> None:
    shard = dataset / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"shard shard-000001\.tar: \d of \d samples, size is"):
        ShardIndex.open(dataset)
    index = ShardIndex.open(dataset, verify=False)
    with pytest.raises(BadMediaError, match="damaged"):
        index.read_member(index.record(9))


def test_a_pipe_or_nothing_in_a_shards_place_is_an_error_and_no_hang(dataset: Path) -> None:
    shard = dataset / "shard-000000.tar"
    shard.unlink()
    with pytest.raises(DataError, match="shard-000000"):
        ShardIndex.open(dataset)
    os.mkfifo(shard)
    with pytest.raises(DataError, match="regular file"):
        ShardIndex.open(dataset)
    index = ShardIndex.open(dataset, verify=False)
    with pytest.raises(StorageError, match="shard-000000"):
        index.read_member(index.record(0))


def tampered_manifest(dataset: Path, **changes: object) -> None:
    """A manifest whose own digest fits, as somebody who means harm would write it."""
    path = dataset / MANIFEST_NAME
    manifest = Manifest.model_validate_json(path.read_bytes()).model_copy(update=changes)
    digest = dataset_digest(manifest.index_sha256, manifest.shards)
    path.write_text(manifest.model_copy(update={"digest": digest}).model_dump_json())


def test_an_index_that_points_outside_its_shards_is_refused(dataset: Path) -> None:
    for field, value in (("offset", 2**64 - 10), ("offset", 10**6), ("length", 2**31)):
        records = np.load(dataset / INDEX_NAME).copy()
        records["video"][field][4] = value
        np.save(dataset / "hostile.npy", records)
        (dataset / "hostile.npy").replace(dataset / INDEX_NAME)
        tampered_manifest(dataset, index_sha256=file_sha256(dataset / INDEX_NAME))
        with pytest.raises(DataError, match="video of sample 4 does not lie in its shard"):
            ShardIndex.open(dataset)
        build_index(dataset)


class Canary:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (f"{os.environ['CANARY']}",))


def test_a_pickle_in_the_indexs_or_an_arrays_place_is_never_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "executed"))
    payload = npy(np.array([Canary()], dtype=object))
    write_tar(dataset / "shard-000001.tar", [members_of("bad", b"v", **{"times.npy": payload})])
    build_index(dataset)
    index = ShardIndex.open(dataset)
    with pytest.raises(BadMediaError, match=r"bad\.times\.npy"):
        index.read_array(index.record(len(index) - 1), Member.TIMES)
    (dataset / INDEX_NAME).write_bytes(payload)
    tampered_manifest(dataset, index_sha256=hashlib.sha256(payload).hexdigest())
    with pytest.raises(DataError, match="not an index"):
        ShardIndex.open(dataset)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("another type", npy(np.zeros(3, dtype=np.float32))),
        ("another shape", npy(np.zeros((3, 1)))),
        ("not finite", npy(np.array([0.0, np.nan]))),
        ("cut off", npy(np.zeros(100))[:-8]),
        ("a shape of petabytes", npy(np.zeros(10)).replace(b"(10,)", b"(9999999999999999,)")),
        ("no array", b"hello"),
    ],
)
def test_an_array_that_is_not_what_the_contract_says_is_a_bad_sample(
    tmp_path: Path, name: str, payload: bytes
) -> None:
    write_tar(tmp_path / "s.tar", [members_of("k", b"v", **{"times.npy": payload})])
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    with pytest.raises(BadMediaError, match=r"damaged: k\.times\.npy"):
        index.read_array(index.record(0), Member.TIMES)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda text: text.replace(b'"schema_version": 1', b'"schema_version": 2'), UsageError,
         "schema version 2, this jepa reads 1"),
        (lambda _: b"[1, 2]", DataError, "malformed"),
        (lambda text: text[:100], DataError, "malformed"),
        (lambda text: text.replace(b"shard-000000.tar", b"../secret.tar"), DataError,
         "no shard's name"),
        (lambda text: text.replace(b'"num_samples": 10', b'"num_samples": 11'), DataError,
         "11"),
        (lambda text: text.replace(b'"bytes": ', b'"bytes": 1'), DataError, "digest"),
        (lambda _: b"[" * 100_000, DataError, "malformed"),
    ],
    ids=["version", "list", "cut", "path", "count", "bytes", "nested"],
)  # fmt: skip
def test_a_wrong_manifest_is_refused_with_what_is_wrong(
    dataset: Path, break_it: Callable[[bytes], bytes], error: type[Exception], message: str
) -> None:
    path = dataset / MANIFEST_NAME
    path.write_bytes(break_it(path.read_bytes()))
    with pytest.raises(error, match=message):
        ShardIndex.open(dataset)


def test_a_folder_without_a_finished_dataset_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prepared dataset") as caught:
        ShardIndex.open(tmp_path)
    assert "jepa prep run" in caught.value.remedy
    with pytest.raises(UsageError, match=f"nowhere, looked for in {Path.cwd()}: no prepared"):
        ShardIndex.open(Path("nowhere"))
    # A name that no file system takes stands for whatever else a disk can answer.
    with pytest.raises(StorageError, match="cannot be read"):
        ShardIndex.open(tmp_path / ("x" * 300))


def test_a_changed_index_is_refused_by_its_digest(dataset: Path) -> None:
    content = bytearray((dataset / INDEX_NAME).read_bytes())
    content[-1] ^= 1
    (dataset / INDEX_NAME).write_bytes(content)
    with pytest.raises(DataError, match="SHA-256 differs"):
        ShardIndex.open(dataset)
