"""Whatever moment a machine dies at, a run has its old checkpoint or its new one, never a mix."""

import json
from pathlib import Path

import pytest

from pipeline.checkpoint import retain, save
from pipeline.checkpoint.layout import CheckpointConfig
from pipeline.checkpoint.load import find_commit, load_encoder_state, read_state
from pipeline.errors import CheckpointError
from tests.crash_points import Recorder, build, contents, leftovers
from tests.test_checkpoint_commit import commit


def save_and_prune(run: Path, step: int) -> None:
    assert commit(run, step).failure is None
    retain.prune(run, CheckpointConfig(keep_last=1))


def sweep(run: Path, scratch: Path) -> list[int]:
    """Steps that are found after a crash at every point of a save and the removal that follows."""
    for step in (0, 1):
        commit(run, step)
    before = contents(run)
    recorder = Recorder(run)
    with recorder.recording():
        save_and_prune(run, 2)
    kinds = {operation.kind for operation in recorder.operations}
    assert kinds == {"write", "make", "sync", "sync_folder", "rename", "remove"}
    found = []
    for count in range(len(recorder.operations) + 1):
        for tree in leftovers(before, recorder.operations, count):
            build(tree, scratch)
            found.append(whole_commit(scratch))
    return found


def whole_commit(run: Path) -> int:
    """The step that a resume would take, whose files are all of that step."""
    path = find_commit(run).commit.path
    step = int(path.name.removeprefix("step-"))
    assert load_encoder_state(path)["w"][0, 0] == step
    assert read_state(path)["value"] == step
    return step


def test_a_crash_at_any_point_leaves_the_old_commit_or_the_new(tmp_path):
    found = sweep(tmp_path / "run", tmp_path / "scratch")
    assert len(found) > 300
    assert set(found) == {1, 2}
    assert found[-1] == 2, "a save that has ended survives a power cut"


@pytest.mark.parametrize("forgotten", ["sync_file", "sync_folder"])
def test_the_sweep_notices_a_synchronisation_that_is_left_out(tmp_path, monkeypatch, forgotten):
    if forgotten == "sync_file":
        monkeypatch.setattr(save, "sync_file", lambda _: None)
    else:
        sync = save.sync_folder
        # That of the folder of checkpoints, which makes a commit's name durable.
        monkeypatch.setattr(
            save, "sync_folder", lambda p: None if p.name == "checkpoints" else sync(p)
        )
        monkeypatch.setattr(save.layout, "LATEST", "../latest")
    found = sweep(tmp_path / "run", tmp_path / "scratch")
    assert 0 in found


def test_a_kill_while_the_manifest_is_half_written_is_no_commit(tmp_path):
    commit(tmp_path, 1)
    partial = tmp_path / "checkpoints" / "step-00000002.partial-x"
    partial.mkdir()
    (partial / "manifest.json").write_text(json.dumps({"schema_version": 2})[:7])
    assert whole_commit(tmp_path) == 1
    partial.rename(partial.with_name("step-00000002"))
    found = find_commit(tmp_path)
    assert found.commit.step == 1
    assert [bad.commit.step for bad in found.rejected] == [2]
    with pytest.raises(CheckpointError, match="Cannot read"):
        find_commit(tmp_path, 2)
