"""Which shard a segment goes into, what a ledger counts, what flags and files mean: no video."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.allocation import allocate, unfinished_shards
from data_prep.flags import PrepFlags, settings_from
from data_prep.ledger import Ledger
from data_prep.records import ItemRecord, Rejection, SegmentFigures, SegmentRecord, Source
from data_prep.samples import sample_key
from data_prep.settings import PrepSettings
from pipeline.data.layout import KEY_PATTERN, Caption
from pipeline.errors import ConfigError, UsageError

SETTINGS = PrepSettings(samples_per_shard=3, shard_mib=10.0)


def source(name: str, **facts) -> Source:
    return Source(name=name, locator=f"/in/{name}", num_bytes=7, modified_ns=5, **facts)


def record(name: str, sizes: list[int], look: str = "", hashes: str = "0f" * 8) -> ItemRecord:
    """A source of segments of so many bytes; `look` stands for what the video shows."""
    return ItemRecord(
        source=name,
        segments=tuple(
            SegmentRecord(
                number=number,
                key=sample_key(name, number),
                start_seconds=4.0 * number,
                end_seconds=4.0 * number + 4.0,
                num_frames=32,
                fps=8.0,
                width=64,
                height=48,
                num_bytes=size,
                video_sha256=f"{name} {number}",
                content_sha256=f"{look or name} {number}",
                figures=SegmentFigures(
                    motion=1.0, black_share=0.0, still_share=0.0, hashes=(hashes,) * 8
                ),
            )
            for number, size in enumerate(sizes)
        ),
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "dataset", SETTINGS) as opened:
        yield opened


def add(ledger: Ledger, *records: ItemRecord) -> None:
    ledger.add_sources([source(one.source) for one in records], SETTINGS)
    for one in records:
        ledger.note(one)


def shards(ledger: Ledger) -> list[list[str]]:
    return [[key for _, keys in plan.items for key in keys] for plan in unfinished_shards(ledger)]


@given(
    sizes=st.lists(st.lists(st.integers(1, 6 << 20), max_size=4), min_size=1, max_size=20),
    per_shard=st.integers(1, 5),
)
def test_shards_hold_every_segment_once_in_order_within_their_limits(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], per_shard: int
) -> None:
    settings = SETTINGS.model_copy(update={"samples_per_shard": per_shard})
    names = [f"{number:03d}" for number in range(len(sizes))]
    with Ledger.open(tmp_path_factory.mktemp("ledger") / "dataset", settings) as ledger:
        # In whatever order they come back from the workers.
        add(ledger, *(record(n, s) for n, s in reversed(list(zip(names, sizes, strict=True)))))
        num_shards = allocate(ledger, settings)
        found = shards(ledger)
        assert allocate(ledger, settings) == 0
    by_key = {
        sample_key(name, number): size
        for name, several in zip(names, sizes, strict=True)
        for number, size in enumerate(several)
    }
    assert [key for shard in found for key in shard] == list(by_key)
    assert num_shards == len(found)
    limit = settings.shard_mib * 2**20
    for shard, following in zip(found, [*found[1:], []], strict=False):
        num_bytes = sum(by_key[key] for key in shard)
        assert len(shard) == 1 or (len(shard) <= per_shard and num_bytes <= limit)
        # None is left half empty while the next segment would fit.
        if following:
            assert len(shard) == per_shard or num_bytes + by_key[following[0]] > limit


def test_the_earliest_name_stays_and_what_is_allocated_already_goes_before_all_names(
    ledger: Ledger,
) -> None:
    add(ledger, record("b", [9], look="x"), record("c", [9], look="x"), record("d", [9]))
    allocate(ledger, SETTINGS)
    assert shards(ledger) == [[sample_key("b", 0), sample_key("d", 0)]]
    add(ledger, record("a", [9], look="x"), record("e", [9], look="e"))
    assert allocate(ledger, SETTINGS) == 1
    assert shards(ledger)[1:] == [[sample_key("e", 0)]]
    assert [(one.source, one.reason, one.detail) for one in ledger.rejections()] == [
        (name, "duplicate", f"segment 0 is like {sample_key('b', 0)}") for name in ("a", "c")
    ]
    assert {one.source: len(one.segments) for one in ledger.records()} == {
        "a": 0, "b": 1, "c": 0, "d": 1, "e": 1
    }  # fmt: skip


def test_look_alikes_are_left_out_if_asked_and_named(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"duplicates": "near"})
    with Ledger.open(tmp_path / "dataset", settings) as ledger:
        add(ledger, record("a", [9]), record("b", [9], hashes="0e" + "0f" * 7),
            record("c", [9], hashes="a3" * 8))  # fmt: skip
        allocate(ledger, settings)
        assert shards(ledger) == [[sample_key("a", 0), sample_key("c", 0)]]
        assert ledger.rejected_by_reason() == {"near duplicate": 1}


def test_what_is_left_out_comes_in_the_order_of_names_and_is_counted_by_reason(
    ledger: Ledger,
) -> None:
    refused = Rejection(source="a", reason="empty", detail="0 bytes")
    add(ledger, record("b", [9]), ItemRecord(source="a", rejections=(refused, refused)))
    ledger.add_other("0.txt", "no video by its suffix")
    # Work that is done again, after a shard was lost, counts once.
    ledger.note(ItemRecord(source="a", rejections=(refused,)))
    assert [one.source for one in ledger.rejections()] == ["0.txt", "a"]
    assert ledger.rejected_by_reason() == {"empty": 1}


def test_a_source_survives_the_ledger_with_all_that_is_known_of_it(ledger: Ledger) -> None:
    caption = Caption(t0=0.0, t1=2.0, text='a dog\n"runs"', source="me", lang="en")
    known = source("caf\\xe9\n.mp4", spans=((0.5, 3.0),), labels={"class": 3}, captions=(caption,))
    strange = Source(name="z", locator="/in/\udce9.mp4", num_bytes=1, modified_ns=1)
    ledger.add_sources([known, strange], SETTINGS)
    assert [one for one, _ in ledger.pending()] == [known, strange]


def test_a_failed_listing_leaves_nothing_behind(ledger: Ledger) -> None:
    def broken() -> Iterator[Source]:
        yield source("a")
        raise UsageError("row 2 is wrong")

    with pytest.raises(UsageError, match="row 2"):
        ledger.add_sources(broken(), SETTINGS)
    assert ledger.count("SELECT count(*) FROM source") == 0


@given(name=st.text(min_size=1, max_size=300), segment=st.integers(0, 9999))
def test_every_key_fits_the_contract_whatever_the_source_is_called(name: str, segment: int) -> None:
    assert KEY_PATTERN.fullmatch(sample_key(name, segment))


def test_flags_go_over_the_file_and_mistakes_are_named_in_its_words(tmp_path: Path) -> None:
    config = tmp_path / "prep.yaml"
    config.write_text("short_side: 288\ncrf: 20\nmin_seconds: 40\nmax_seconds: 60\n")

    def flags(**given) -> PrepFlags:
        return PrepFlags(**given)  # pyright: ignore[reportCallIssue]

    found = settings_from(flags(crf=26, fps="native"), config)
    assert (found.short_side, found.crf, found.fps, found.max_seconds) == (288, 26, "native", 60)
    assert settings_from(None, None) == PrepSettings()
    with pytest.raises(UsageError, match=r"--crf: .*less than or equal to 51, got 99"):
        settings_from(flags(crf=99), None)
    with pytest.raises(UsageError, match=r"max_seconds must be at least min_seconds \(1\), got"):
        settings_from(flags(max_seconds=0.5), None)
    config.write_text("short_size: 288\n")
    with pytest.raises(ConfigError, match="short_size"):
        settings_from(None, config)


def test_a_start_that_found_no_source_binds_nobody_to_its_settings(tmp_path):
    other = PrepSettings(samples_per_shard=4)
    with Ledger.open(tmp_path / "dataset", SETTINGS):
        pass
    with Ledger.open(tmp_path / "dataset", other) as ledger:
        ledger.add_sources([source("a.mp4")], other)
    with (
        pytest.raises(UsageError, match="--samples-per-shard was 4, now 3"),
        Ledger.open(tmp_path / "dataset", SETTINGS),
    ):
        pass
