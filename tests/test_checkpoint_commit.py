"""A checkpoint is whole or not there; any changed byte is seen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.checkpoint import layout, retain, save
from pipeline.checkpoint.fingerprint import fingerprint_pieces
from pipeline.checkpoint.layout import CheckpointConfig
from pipeline.checkpoint.load import find_commit, load_encoder_state, verify
from pipeline.checkpoint.pieces import Piece, metadata_of
from pipeline.errors import CheckpointError


def write_files(folder: Path, value: float) -> dict[str, int]:
    flat = torch.full((6,), value)
    piece = Piece(name="teacher.w", shape=(2, 3), start=0, flat=flat)
    save_file({piece.name: flat}, folder / layout.weights_name(0), metadata_of([piece]))
    (folder / layout.STATE).write_text(json.dumps({"value": value}))
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.bin").write_bytes(bytes(range(200)))
    return fingerprint_pieces([piece])


def commit(run: Path, step: int, write=write_files) -> save.SaveResult:
    request = save.SaveRequest(
        run_dir=run,
        run_id="r",
        step=step,
        parent_step=None,
        versions={},
        write=lambda folder: write(folder, float(step)),
    )
    return save.save(request)


def test_a_commit_verifies_and_gives_back_what_was_written(tmp_path):
    assert commit(tmp_path, 3).failure is None
    found = find_commit(tmp_path)
    assert found.commit.step == 3
    assert verify(found.commit.path) == []
    state = load_encoder_state(found.commit.path)
    torch.testing.assert_close(state["w"], torch.full((2, 3), 3.0))
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == found.commit.path.name


@pytest.fixture(scope="module")
def two_commits(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    commit(run, 1)
    commit(run, 2)
    return run


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_changed_byte_rejects_the_newest_commit_and_falls_back(
    two_commits, tmp_path_factory, data
):
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(two_commits, run)
    newest = layout.list_commits(run)[-1].path
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "zero"]))
    if change == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "cut":
        del content[place:]
    else:
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    unchanged = bytes(content) == path.read_bytes()
    path.write_bytes(content)
    try:
        found = find_commit(run)
    except CheckpointError:
        pytest.fail("the older commit is whole and must be found")
    if found.commit.step == 2:
        # A manifest may be changed without harm (a blank, a version's name); its files may not.
        assert unchanged or path.name == layout.MANIFEST
        assert load_encoder_state(newest)["w"][0, 0] == 2
    else:
        assert found.rejected[0].reasons
    shutil.rmtree(run.parent)


def test_files_of_another_checkpoint_are_rejected(tmp_path):
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    first, second = (c.path for c in layout.list_commits(tmp_path))
    shutil.copy(first / layout.weights_name(0), second / layout.weights_name(0))
    assert any("digest differs" in problem for problem in verify(second))
    (first / "stray.bin").write_bytes(b"x")
    assert verify(first) == ["file stray.bin is not in the manifest"]


def test_a_save_that_fails_is_named_and_leaves_nothing(tmp_path):
    commit(tmp_path, 1)

    def full_disk(folder: Path, value: float) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device", str(folder / "half"))

    result = commit(tmp_path, 2, full_disk)
    assert result.failure is not None
    assert "No space left" in result.failure
    assert layout.list_partials(tmp_path) == []
    assert [c.step for c in layout.list_commits(tmp_path)] == [1]


def test_a_save_cut_short_is_ignored_and_cleared(tmp_path):
    commit(tmp_path, 1)
    partial = tmp_path / "checkpoints" / "step-00000002.partial-abc"
    partial.mkdir()
    (tmp_path / "checkpoints" / ".latest.32608-32749.partial").write_text("step-0000")
    assert [c.step for c in layout.list_commits(tmp_path)] == [1]
    assert retain.clear_partials(tmp_path) == [partial.name]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"latest", "step-00000001"}


def test_pruning_keeps_the_first_the_last_and_every_nth(tmp_path):
    for step in range(0, 11):
        commit(tmp_path, step)
    removed = retain.prune(tmp_path, CheckpointConfig(keep_last=2, keep_every_steps=4))
    assert [c.step for c in layout.list_commits(tmp_path)] == [0, 4, 8, 9, 10]
    assert removed == [1, 2, 3, 5, 6, 7]


def test_going_on_from_an_older_step_sets_newer_ones_aside_and_keeps_them(tmp_path):
    for step in (0, 2, 4):
        commit(tmp_path, step)
    names = retain.set_aside_after(tmp_path, 2)
    assert [c.step for c in layout.list_commits(tmp_path)] == [0, 2]
    assert len(names) == 1
    assert verify(tmp_path / "checkpoints" / names[0]) == []


def test_asking_for_a_step_that_is_not_there_lists_those_that_are(tmp_path):
    commit(tmp_path, 1)
    commit(tmp_path, 7)
    with pytest.raises(CheckpointError, match="there are: 1, 7"):
        find_commit(tmp_path, 3)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_commit(tmp_path / "elsewhere")
