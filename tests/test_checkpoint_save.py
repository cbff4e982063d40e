"""Ranks save without a collective; what the file system refuses is tried again, then told."""

import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline.checkpoint import layout, notes, retain, save
from pipeline.checkpoint.background import Background
from pipeline.checkpoint.load import find_commit, verify
from pipeline.checkpoint.save import SaveRequest, SaveResult
from pipeline.errors import StorageError

Usage = namedtuple("Usage", "total used free")


def write_of(rank: int):
    def write(folder: Path) -> dict[str, int]:
        (folder / f"part-{rank}").write_bytes(bytes([rank]) * 100)
        return {"w": rank + 1}

    return write


def request(run: Path, rank: int, **changes) -> SaveRequest:
    fields = {
        **{"run_dir": run, "run_id": "r", "step": 4, "parent_step": None, "versions": {}},
        **{"write": write_of(rank), "rank": rank, "world_size": 2, "timeout_seconds": 20.0},
    }
    return SaveRequest(**{**fields, **changes})


def save_on(*requests: SaveRequest) -> list[SaveResult]:
    """Every request on a thread of its own, as ranks are processes of their own."""
    results: dict[int, SaveResult] = {}

    def one(number: int) -> None:
        results[number] = save.save(requests[number])

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[number] for number in range(len(requests))]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(save, "_FIRST_PAUSE_SECONDS", 0.01)


def test_two_ranks_make_one_commit_with_the_files_and_fingerprints_of_both(tmp_path):
    results = save_on(request(tmp_path, 1), request(tmp_path, 0, fence=7))
    assert [result.failure for result in results] == [None, None]
    commit = find_commit(tmp_path).commit
    assert verify(commit.path) == []
    manifest = layout.read_manifest(commit.path)
    assert [entry.path for entry in manifest.files] == ["part-0", "part-1"]
    assert (manifest.world_size, manifest.fence) == (2, 7)
    assert manifest.fingerprints == {"w": f"{3:016x}"}
    assert sorted(p.name for p in commit.path.iterdir()) == ["manifest.json", "part-0", "part-1"]


def failing(times: int, error: Exception):
    """Fails so often, then writes."""
    left = [times]

    def write(folder: Path) -> dict[str, int]:
        (folder / "half").write_bytes(b"x")
        if left[0]:
            left[0] -= 1
            raise error
        (folder / "half").unlink()
        return write_of(1)(folder)

    return write


def test_what_is_refused_once_is_tried_again_and_put_on_record(tmp_path):
    full = OSError(28, "No space left on device", "somewhere/half")
    requests = [
        request(tmp_path, 0, retries=2),
        request(tmp_path, 1, retries=2, write=failing(2, full)),
    ]
    result = save_on(*requests)[0]
    assert result.failure is None
    assert result.retried == ("rank 1: No space left on device (somewhere/half)",) * 2
    assert verify(find_commit(tmp_path).commit.path) == []


def test_a_rank_that_fails_for_good_is_named_and_nothing_of_the_step_remains(tmp_path):
    broken = RuntimeError("unexpected pos 64 vs 0\nmore")
    requests = [
        request(tmp_path, 0),
        request(tmp_path, 1, retries=1, write=failing(9, broken)),
    ]
    result = save_on(*requests)[0]
    assert result.failure is not None
    assert "rank 1: unexpected pos" in result.failure
    assert "free" in result.failure
    assert list(layout.checkpoints_dir(tmp_path).iterdir()) == []


def test_a_rank_that_never_writes_is_named_after_the_time_limit(tmp_path):
    result = save_on(request(tmp_path, 0, timeout_seconds=0.2))[0]
    assert result.failure == "rank 1: gave no word within 0 s"
    assert list(layout.checkpoints_dir(tmp_path).iterdir()) == []


def test_a_wait_ends_early_when_the_save_is_no_longer_wanted(tmp_path):
    give_up = threading.Event()
    give_up.set()
    found = notes.collect_notes(tmp_path, 2, timeout_seconds=1000.0, give_up=give_up)
    assert found == {}


def test_too_little_space_is_told_with_both_numbers_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 200 << 20))
    written = []
    full = request(tmp_path, 0, world_size=1, num_bytes=180 << 20, write=written.append)
    result = save.save(full)
    assert result.failure is not None
    assert "no space: need 216.0 MiB, have 200.0 MiB" in result.failure
    assert written == []


def test_a_run_that_another_job_took_over_is_not_written_to(tmp_path):
    def forbid() -> None:
        raise StorageError("taken over")

    with pytest.raises(StorageError, match="taken over"):
        save.save(request(tmp_path, 0, world_size=1, may_publish=forbid))
    assert layout.list_commits(tmp_path) == []
    assert layout.list_partials(tmp_path) == []


def test_a_pinned_commit_outlives_pruning_and_still_verifies(tmp_path):
    for step in range(6):
        save.save(request(tmp_path, 0, world_size=1, step=step))
    commits = layout.list_commits(tmp_path)
    retain.pin(commits[2])
    assert verify(commits[2].path) == []
    config = layout.CheckpointConfig(keep_last=1)
    assert retain.prune(tmp_path, config) == [1, 3, 4]
    retain.unpin(commits[2])
    assert retain.prune(tmp_path, config) == [2]


def test_work_behind_the_training_gives_its_result_or_its_error():
    work: Background[int] = Background()
    assert work.result() is None
    go = threading.Event()
    work.start(lambda: go.wait(10) and 7)
    assert work.is_busy
    assert work.result() is None
    with pytest.raises(RuntimeError, match="not ended"):
        work.start(lambda: 8)
    assert not work.wait(0.01)
    go.set()
    assert work.wait(10)
    assert work.result() == 7

    def refuse() -> int:
        raise StorageError("no")

    work.start(refuse)
    work.wait()
    with pytest.raises(StorageError, match="no"):
        work.result()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_work_itself_is_never_silent():
    work: Background[int] = Background()
    work.start(lambda: 1 // 0)
    work.wait()
    with pytest.raises(RuntimeError, match="broke off"):
        work.result()
