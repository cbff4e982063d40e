"""Real runs on two ranks: saving goes on behind the training and fails in the open."""

import itertools
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import verify
from pipeline.checkpoint.store import CommitStore
from pipeline.errors import ExitCode
from pipeline.track.metrics import read_events, read_metrics
from tests.running import all_events, faulty, finish, jepa, write_config
from tests.shards import write_dataset

KEEP_ALL = {"keep_last": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "data", 24)
    return folder


def url_of(folder: Path) -> str:
    return f"file://{folder / 'store'}"


@pytest.fixture(scope="module")
def behind(folder) -> Path:
    """Copying and writing take their time, so that steps change what is being saved meanwhile."""
    checkpoint = {**KEEP_ALL, "store": url_of(folder), "every_steps": 2}
    config = write_config(folder, "behind", checkpoint=checkpoint)
    # Steps 3 and 6 end a stage, which waits for its save: there is nothing behind to be seen.
    copy = {"rank": 0, "fault": "slow_copy", "seconds": 0.5}
    write = {"rank": 1, "fault": "late_write"}
    slow = [
        change
        for step in (2, 4)
        for change in ({**copy, "step": step}, {**write, "step": step, "until": step + 1})
    ]
    code, output = finish(faulty(slow, folder / "behind", "train", config))
    assert code == ExitCode.DONE, output
    return folder / "behind"


@pytest.fixture(scope="module")
def standing_still(folder) -> Path:
    checkpoint = {**KEEP_ALL, "background": False, "every_minutes": 60}
    config = write_config(folder, "still", checkpoint=checkpoint)
    code, output = finish(jepa("train", config, "--ranks", 2))
    assert code == ExitCode.DONE, output
    return folder / "still"


def fingerprints(run: Path) -> dict[int, dict[str, str]]:
    commits = layout.list_commits(run)
    return {commit.step: layout.read_manifest(commit.path).fingerprints for commit in commits}


def test_what_is_saved_behind_the_training_is_the_state_of_that_very_step(behind, standing_still):
    saved = fingerprints(behind)
    assert list(saved) == [0, 2, 3, 4, 6]
    assert saved == fingerprints(standing_still)
    for one, other in itertools.combinations(saved.values(), 2):
        assert one.keys() >= other.keys() or one.keys() <= other.keys()
        assert one != other
    assert all(verify(commit.path) == [] for commit in layout.list_commits(behind))


def test_the_chosen_time_between_saves_is_on_record_once(standing_still):
    told = [e for e in read_events(standing_still) if e.name == "save_interval"]
    assert [(e.step, e.details) for e in told] == [
        (0, {"seconds_between": 3600.0, "reason": "checkpoint.every_minutes"})
    ]


def test_steps_are_taken_while_a_checkpoint_is_written(behind):
    events = [e for e in read_events(behind) if e.name in ("save_begun", "save")]
    assert [(e.name, e.step) for e in events[:6]] == [
        *[("save_begun", 0), ("save", 0)],
        *[("save_begun", 2), ("save", 2), ("save_begun", 3), ("save", 3)],
    ]
    begun, saved = events[2], events[3]
    inside = [s for s in read_metrics(behind) if begun.time < s.time < saved.time]
    assert [s.report.step for s in inside] == [3], "its end is a stage's, which waits to be saved"
    assert inside[0].time - begun.time > 0.5, "no update before the copy is there"
    assert saved.details["behind_seconds"] > max(0.5, begun.details["seconds"])


def test_a_run_whose_folder_is_lost_goes_on_from_its_store_bit_for_bit(behind, folder, tmp_path):
    expected = fingerprints(behind)[6]
    losses = {s.report.step: s.report.loss.hex() for s in read_metrics(behind)}
    assert CommitStore(url_of(folder), "behind").steps() == [0, 2, 3, 4, 6]
    shutil.move(behind, tmp_path / "lost")
    words = ["--store", url_of(folder), "--step", 4]
    code, output = finish(jepa("resume", behind, *words))
    assert code == ExitCode.DONE, output
    assert "step 4 brought back" in output
    assert fingerprints(behind) == {4: fingerprints(tmp_path / "lost")[4], 6: expected}
    again = {s.report.step: s.report.loss.hex() for s in read_metrics(behind)}
    assert again == {step: losses[step] for step in (5, 6)}
    assert CommitStore(url_of(folder), "behind").steps() == [0, 2, 3, 4, 6]


def test_a_scheduler_that_starts_a_lost_run_again_finds_it_in_its_store(behind, folder, tmp_path):
    shutil.move(behind, tmp_path / "lost again")
    code, output = finish(jepa("train", folder / "behind.yaml", "--or-resume"))
    assert code == ExitCode.DONE, output
    assert "step 6 brought back" in output
    assert "is finished" in output
    assert list(fingerprints(behind)) == [6]


def test_saves_that_fail_are_named_and_end_the_run_when_they_are_too_many_in_a_row(folder):
    checkpoint = {"every_steps": 1, "retries": 0, "max_failed_in_a_row": 2}
    config = write_config(folder, "full", checkpoint=checkpoint)
    full = [{"rank": 1, "fault": "no_space", "step": 2}]
    code, output = finish(faulty(full, folder / "full", "train", config))
    assert code == ExitCode.STORAGE, output
    assert "rank 1: No space left on device" in output
    run = folder / "full"
    assert [e.step for e in all_events(run) if e.name == "save_failed"] == [2, 3]
    assert [commit.step for commit in layout.list_commits(run)] == [0, 1]
    assert layout.list_partials(run) == []
