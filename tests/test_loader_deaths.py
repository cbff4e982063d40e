"""Workers that die: the run shows the very clips of an undisturbed one, or says what is missing."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pipeline.data.blocks import require_shared_memory
from pipeline.data.clips import LoadClip, make_order, open_sources
from pipeline.data.decode import DecodeLimits
from pipeline.data.loader import CrewStart, Loader, make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.errors import DataError, StorageError
from pipeline.masks.collate import collate_plan
from tests.shards import make_plans, write_dataset
from tests.workers import sabotage

NUM_SAMPLES = 12
LIMITS = DecodeLimits(max_seconds=0.5, max_memory_bytes=256 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shards") / "set", NUM_SAMPLES)


def config_of(folder: Path, **settings) -> DataConfig:
    settings = {"workers": 2, "prefetch": 1, "decode": LIMITS, **settings}
    return DataConfig(sources=(Source(path=str(folder)),), **settings)


def sabotaged(folder: Path, *lines: str, **settings) -> Loader:
    """A loader whose workers meet what `lines` say (see `SabotagedIndex`)."""
    sabotage.plan(folder, *lines)
    config = config_of(folder, **settings)
    order = make_order(config, open_sources(config), seed=3)
    datasets = (sabotage.SabotagedIndex.open(folder),)
    load_clip = LoadClip(config=config, order=order, datasets=datasets)
    collate = partial(collate_plan, seed=3)
    return Loader(CrewStart(load_clip=load_clip, plans=make_plans(), collate=collate, pin=False))


@pytest.fixture(scope="module")
def undisturbed(folder) -> list[tuple]:
    collate = partial(collate_plan, seed=3)
    with make_loader(config_of(folder), plans=make_plans(), collate=collate, seed=3) as loader:
        return shown(loader)


def shown(loader: Loader) -> list[tuple]:
    """Everything that training sees of a run, by micro-batch."""
    return [(batch.keys, batch.refs, batch.video_BCTHW.numpy().tobytes()) for batch in loader]


def test_a_worker_killed_from_outside_is_replaced_and_every_clip_comes_as_before(
    folder, undisturbed
):
    collate = partial(collate_plan, seed=3)
    with make_loader(config_of(folder), plans=make_plans(), collate=collate, seed=3) as loader:
        begin = [next(loader) for _ in range(3)]
        os.kill(loader.pids[1], signal.SIGKILL)
        found = shown(iter([*begin, *loader]))
        notices = loader.take_notices()
    assert found == undisturbed
    assert len(notices) == 1
    assert notices[0].startswith("worker 1 lost (killed by SIGKILL")
    assert "restarted behind micro-batch" in notices[0]


@pytest.mark.parametrize("deed", ["kill", "crash"])
def test_a_worker_that_dies_once_at_a_sample_loads_it_the_second_time(folder, undisturbed, deed):
    with sabotaged(folder, f"clip-00005 {deed} 1") as loader:
        assert shown(loader) == undisturbed
        assert "at clip-00005 in" in loader.take_notices()[0]


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("crash", "decoder killed: signal SIGSEGV, twice"),
        ("loop", "decoder killed: time: more than 0.5 s of the processor's"),
        ("bomb", "memory limit: decoding takes more than 268435456 bytes"),
    ],
)
def test_a_video_that_kills_its_decoder_is_replaced_and_moves_no_other(
    folder, undisturbed, deed, reason
):
    with sabotaged(folder, f"clip-00005 {deed} 99") as loader:
        batches = list(loader)
    found = shown(iter(batches))
    faults = [fault for batch in batches for fault in batch.faults]
    assert {(fault.key, fault.reason) for fault in faults} == {("clip-00005", reason)}
    for was, now in zip(undisturbed, found, strict=True):
        for key, ref, new_key, new_ref in zip(was[0], was[1], now[0], now[1], strict=True):
            assert new_ref.position == ref.position
            assert (new_key == key) == (key != "clip-00005")
            assert (new_ref == ref) == (key != "clip-00005")


def test_lack_of_memory_never_speaks_against_a_sample(folder):
    with sabotaged(folder, "clip-00005 kill 99", max_worker_deaths=2) as loader:
        with pytest.raises(DataError, match=r"SIGKILL.*ran out of memory.*at clip-00005") as caught:
            list(loader)
        assert len(loader.take_notices()) == 2
    assert "fewer data.workers" in caught.value.remedy


CONFINED = """
import sys
import numpy as np
from pipeline.data.badmedia import BadMediaError
from pipeline.data.confine import DecodeLimits, confined
try:
    with confined(DecodeLimits(max_memory_bytes=64 << 20, max_seconds=0.01)):
        np.ones(1 << 30, dtype=np.uint8)
except BadMediaError as error:
    print(error.reason)
np.ones(1 << 28, dtype=np.uint8)
print("free again", flush=True)
with confined(DecodeLimits(max_seconds=0.01)):
    while True:
        pass
"""


def test_the_kernel_itself_bounds_memory_and_time_of_a_decode():
    done = subprocess.run(
        [sys.executable, "-c", CONFINED], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.split("\n")[:2] == ["memory limit", "free again"]
    assert done.returncode == -signal.SIGPROF


def test_too_little_shared_memory_is_refused_with_what_is_needed_and_what_there_is(tmp_path):
    with pytest.raises(StorageError, match=r"need \d+ MiB for 8 workers, have \d+ MiB") as caught:
        require_shared_memory(1 << 60, "8 workers", tmp_path)
    assert "shm-size" in caught.value.remedy
    require_shared_memory(1 << 10, "one worker", tmp_path)
    require_shared_memory(1 << 60, "a machine without it", tmp_path / "none")
