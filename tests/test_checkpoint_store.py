"""A store has no rename: there the manifest makes a commit, and a lost run comes back from it."""

import json
import shutil
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from pipeline.checkpoint import layout, mirror
from pipeline.checkpoint.layout import CheckpointConfig
from pipeline.checkpoint.load import find_commit, verify
from pipeline.checkpoint.save import SaveRequest
from pipeline.checkpoint.store import CommitStore
from pipeline.errors import CheckpointError, StorageError
from tests.crash_points import contents
from tests.s3 import s3_server
from tests.test_checkpoint_commit import commit
from tests.test_checkpoint_crash import whole_commit

KEEP_ALL = CheckpointConfig(keep_last=100)


@pytest.fixture(scope="module")
def bucket():
    with s3_server():
        fsspec.filesystem("s3").mkdir("bucket")
        yield


@pytest.fixture(params=["memory", "file", "s3"])
def url(request, tmp_path) -> str:
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return f"s3://bucket/{uuid.uuid4().hex}"
    if request.param == "file":
        return f"file://{tmp_path / 'elsewhere'}"
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def save_to(url: str, run: Path, step: int, config: CheckpointConfig = KEEP_ALL) -> str | None:
    """Commits a step in the run's folder and carries it to the store, as one rank."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"run_id": "r"}))
    (run / "config.yaml").write_text("name: run\n")
    assert commit(run, step).failure is None
    return mirror.upload(CommitStore(url, run.name), request_for(run, step), config)


def request_for(run: Path, step: int, **changes) -> SaveRequest:
    fields = {"run_dir": run, "run_id": "r", "step": step, "parent_step": None, "versions": {}}
    return SaveRequest(**{**fields, "write": lambda _: None, "token": "t", **changes})


def test_a_lost_run_comes_back_with_the_very_bytes_of_its_newest_commit(url, tmp_path):
    run = tmp_path / "run"
    for step in (0, 3, 7):
        assert save_to(url, run, step) is None
    kept = contents(run / "checkpoints" / layout.commit_name(7))
    shutil.rmtree(run)
    restored = mirror.restore(CommitStore(url, "run"), run)
    assert restored is not None
    assert restored.step == 7
    assert contents(run / "checkpoints" / layout.commit_name(7)) == kept
    assert whole_commit(run) == 7
    assert (run / "config.yaml").read_text() == "name: run\n"
    assert mirror.restore(CommitStore(url, "run"), run) is None, "there is one now"
    assert mirror.restore(CommitStore(url, "run"), run, step=3).step == 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def kill_at(monkeypatch, url: str, allowed: int) -> list[str]:
    """From now on the process is killed before the store's operation number `allowed`."""
    done: list[str] = []
    kind = type(CommitStore(url, "run")._fs)
    for name in ("put_file", "pipe_file", "rm_file", "rm"):
        original = getattr(kind, name)

        def counted(*arguments, original=original, name=name, **named):
            if len(done) == allowed:
                raise Killed
            done.append(name)
            return original(*arguments, **named)

        monkeypatch.setattr(kind, name, counted)
    return done


def test_a_kill_at_any_operation_leaves_the_old_commit_or_the_new_in_the_store(
    tmp_path, monkeypatch
):
    only_last, ends, allowed = CheckpointConfig(keep_last=1), [], 0
    while True:
        url, run = f"memory://{uuid.uuid4().hex}", tmp_path / str(allowed) / "run"
        for step in (0, 1):
            assert save_to(url, run, step, only_last) is None
        with monkeypatch.context() as patch:
            kill_at(patch, url, allowed)
            try:
                save_to(url, run, 2, only_last)
                was_killed = False
            except Killed:
                was_killed = True
        restored = mirror.restore(CommitStore(url, "run"), tmp_path / "back" / str(allowed) / "run")
        assert restored is not None
        assert not restored.rejected, "nothing without its files looks like a commit"
        ends.append(whole_commit(tmp_path / "back" / str(allowed) / "run"))
        if not was_killed:
            break
        allowed += 1
    assert allowed > 8
    assert ends == sorted(ends)
    assert set(ends) == {1, 2}
    assert CommitStore(url, "run").steps() == [0, 2]


def test_saving_a_step_again_never_shows_files_of_both_saves(tmp_path, monkeypatch, memory):
    run = tmp_path / "run"
    for step in (1, 2):
        save_to(memory, run, step)
    shutil.rmtree(run / "checkpoints" / layout.commit_name(2))
    with monkeypatch.context() as patch:
        kill_at(patch, memory, 7)
        with pytest.raises(Killed):
            save_to(memory, run, 2)
    assert CommitStore(memory, "run").steps() == [1]
    shutil.rmtree(run)
    assert save_to(memory, run, 2) is None
    assert CommitStore(memory, "run").steps() == [1, 2]


def test_going_on_from_an_older_step_takes_the_marker_from_the_line_that_was_left(tmp_path, memory):
    run = tmp_path / "run"
    for step in (0, 2, 4, 6):
        save_to(memory, run, step)
    save_to(memory, run, 3)
    assert CommitStore(memory, "run").steps() == [0, 2, 3]


def test_a_damaged_commit_in_the_store_is_named_and_an_older_one_taken(tmp_path, url):
    run = tmp_path / "run"
    for step in (1, 2):
        save_to(url, run, step)
    store = CommitStore(url, "run")
    path = f"{store._root}/{layout.commit_name(2)}/{layout.weights_name(0)}"
    content = bytearray(store._fs.cat_file(path))
    content[-3] ^= 1
    store._fs.pipe_file(path, bytes(content))
    shutil.rmtree(run)
    restored = mirror.restore(store, run)
    assert restored is not None
    assert restored.step == whole_commit(run) == 1
    assert "digest differs" in str(restored.rejected)
    assert [p.name for p in layout.checkpoints_dir(run).iterdir()] == [layout.commit_name(1)]
    with pytest.raises(CheckpointError, match="digest differs"):
        mirror.restore(store, run, step=2)


def test_pruning_and_pins_hold_in_the_store_as_well(tmp_path, memory):
    run, config = tmp_path / "run", CheckpointConfig(keep_last=2, keep_every_steps=4)
    for step in range(8):
        save_to(memory, run, step, config)
    assert CommitStore(memory, "run").steps() == [0, 4, 6, 7]


def test_ranks_share_the_upload_and_rank_0_marks_it(tmp_path, memory, monkeypatch):
    run, uploads = tmp_path / "run", []
    assert commit(run, 5).failure is None
    put = CommitStore.put
    monkeypatch.setattr(
        CommitStore,
        "put",
        lambda store, step, path, local: (
            uploads.append(threading.current_thread().name),
            put(store, step, path, local),
        ),
    )

    def one(rank: int) -> None:
        request = request_for(run, 5, rank=rank, world_size=2, timeout_seconds=20)
        assert mirror.upload(CommitStore(memory, "run"), request, KEEP_ALL) is None

    ranks = [threading.Thread(target=one, args=(r,), name=f"rank {r}") for r in (1, 0)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(30)
    assert sorted(set(uploads)) == ["rank 0", "rank 1"]
    assert len(uploads) == 3
    assert CommitStore(memory, "run").steps() == [5]
    assert layout.list_partials(run) == []


def test_a_store_that_refuses_costs_no_local_commit_and_is_named(tmp_path):
    run = tmp_path / "run"
    (tmp_path / "elsewhere").write_text("a file where a folder should be")
    failure = save_to(f"file://{tmp_path}/elsewhere", run, 2)
    assert failure is not None
    assert "elsewhere/run" in failure
    assert verify(find_commit(run).commit.path) == []
    assert find_commit(run).commit.step == 2
    assert layout.list_partials(run) == []


def test_another_run_of_the_same_name_is_left_alone(tmp_path, memory):
    run = tmp_path / "run"
    save_to(memory, run, 1)
    request = request_for(run, 1, run_id="other")
    failure = mirror.upload(CommitStore(memory, "run"), request, KEEP_ALL)
    assert failure is not None
    assert "another run, r" in failure
    assert CommitStore(memory, "run").steps() == [1]
    (run / "run.json").write_text(json.dumps({"run_id": "other"}))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="two runs of the same name"):
        mirror.restore(CommitStore(memory, "run"), run)


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, memory):
    run = tmp_path / "run"
    save_to(memory, run, 1)
    manifest = layout.read_manifest(find_commit(run).commit.path)
    hostile = replace(manifest.files[0], path="../../../escaped")
    store = CommitStore(memory, "run")
    store.mark(1, replace(manifest, files=(hostile,)).to_json().encode())
    with pytest.raises(CheckpointError, match=r"names a file '\.\./"):
        store.fetch(1, tmp_path / "target")
    assert not (tmp_path / "escaped").exists()


def test_what_is_no_store_or_no_run_is_named(tmp_path, memory):
    with pytest.raises(StorageError, match="gopher://"):
        CommitStore("gopher://x", "run")
    with pytest.raises(CheckpointError, match="holds no run"):
        mirror.restore(CommitStore(memory, "run"), tmp_path / "run")
    with pytest.raises(ValueError, match="expected a URL"):
        CheckpointConfig(store="bucket/prefix")
    with pytest.raises(ValueError, match="no password"):
        CheckpointConfig(store="s3://user:secret@bucket/prefix")
