"""`jepa ckpt`: what people see of a run's checkpoints, and what they may do to them."""

import json
import math
from pathlib import Path

import pytest

from pipeline.checkpoint import layout
from pipeline.cli import main
from pipeline.config.load import resolved_yaml
from pipeline.errors import ExitCode
from tests.plain import tiny_config
from tests.test_checkpoint_corruption import content_of, write_run

TENSOR = "exp_avg/encoder.w"


@pytest.fixture
def run(tmp_path) -> Path:
    """Steps 1 to 3 of a run that keeps one of the newest; the first always stays."""
    config = tiny_config(name="mine", runs_folder=str(tmp_path), checkpoint={"keep_last": 1})
    run = write_run(tmp_path / "mine", "mine", 100)
    (run / "config.yaml").write_text(resolved_yaml(config))
    (run / "run.json").write_text(json.dumps({"run_id": "mine"}))
    return run


def jepa(capsys, *words: object) -> tuple[int, dict]:
    code = main(["ckpt", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def damage(run: Path, step: int) -> None:
    path = layout.checkpoints_dir(run) / layout.commit_name(step) / layout.optimizer_name(1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def steps(run: Path) -> list[int]:
    return [commit.step for commit in layout.list_commits(run)]


def test_ls_tells_stage_size_ranks_pins_and_what_is_damaged_at_a_glance(run, capsys):
    assert jepa(capsys, "pin", run, 2)[0] == ExitCode.DONE
    (layout.checkpoints_dir(run) / "step-00000003" / layout.MANIFEST).unlink()
    (layout.checkpoints_dir(run) / "step-00000004.partial-mine").mkdir()
    code, told = jepa(capsys, "ls", run)
    assert code == ExitCode.DONE
    first, second, third = told["checkpoints"]
    assert (first["step"], first["stage"], first["world_size"]) == (1, "short", 1)
    assert first["bytes"] > 1000
    assert [row["pinned"] for row in (first, second, third)] == [False, True, False]
    assert first["problems"] == second["problems"] == []
    assert "no manifest.json" in third["problems"][0]
    assert told["cut_short"] == ["step-00000004.partial-mine"]
    assert main(["ckpt", "ls", str(run)]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "not usable" in told
    assert "step 3: " in told
    (run / "config.yaml").unlink()
    code, told = jepa(capsys, "ls", run)
    assert (code, told["checkpoints"][0]["stage"]) == (ExitCode.DONE, None)


def test_a_run_without_a_checkpoint_is_a_run_and_a_folder_of_something_else_is_none(run, capsys):
    layout.checkpoints_dir(run).rename(run.parent / "elsewhere")
    assert jepa(capsys, "ls", run) == (0, {"checkpoints": [], "cut_short": [], "aside": []})
    code, told = jepa(capsys, "verify", run)
    assert (code, told["error"]["message"]) == (ExitCode.CONFIG, f"{run} has no checkpoint.")
    code, told = jepa(capsys, "ls", run.parent / "elsewhere")
    assert code == ExitCode.USAGE
    assert "such as runs/NAME" in told["error"]["remedy"]
    assert main(["resume", str(run.parent / "elsewhere")]) == ExitCode.USAGE


def test_verify_exits_78_and_names_file_and_tensor(run, capsys):
    assert jepa(capsys, "verify", run)[0] == ExitCode.DONE
    damage(run, 2)
    code, told = jepa(capsys, "verify", run)
    assert code == ExitCode.CONFIG
    assert [bool(found["problems"]) for found in told] == [False, True, False]
    assert "optimizer-rank00001.safetensors: its digest differs" in told[1]["problems"][0]
    assert jepa(capsys, "verify", run, "--step", 3)[0] == ExitCode.DONE
    code, told = jepa(capsys, "verify", run, "--step", 9)
    assert code == ExitCode.CONFIG
    assert "there are: 1, 2, 3" in told["error"]["message"]


def test_verify_takes_no_checkpoint_of_another_run_for_its_own(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", "other", 200)
    layout.checkpoints_dir(other).rename(run / "checkpoints-of-other")
    layout.checkpoints_dir(run).rename(run / "own")
    (run / "checkpoints-of-other").rename(layout.checkpoints_dir(run))
    code, told = jepa(capsys, "verify", run)
    assert code == ExitCode.CONFIG
    assert all("of run other" in found["problems"][0] for found in told)


def test_prune_keeps_what_the_settings_and_pins_want_and_says_first_what_would_go(run, capsys):
    before = content_of(run)
    assert jepa(capsys, "prune", run, "--dry-run")[1] == {"removed": [], "would_remove": [2]}
    assert content_of(run) == before
    jepa(capsys, "pin", run, 2)
    assert jepa(capsys, "prune", run)[1]["removed"] == []
    jepa(capsys, "pin", run, 2, "--undo")
    assert jepa(capsys, "prune", run)[1]["removed"] == [2]
    assert steps(run) == [1, 3]


def test_nothing_is_pruned_while_the_newest_is_damaged(run, capsys):
    damage(run, 3)
    code, told = jepa(capsys, "prune", run)
    assert code == ExitCode.CONFIG
    assert "Nothing was removed" in told["error"]["message"]
    assert steps(run) == [1, 2, 3]


def test_cat_prints_the_manifest_and_one_tensor_in_numbers(run, capsys):
    _, told = jepa(capsys, "cat", run)
    assert told["manifest"]["step"] == told["state"]["step"] == 3
    assert told["tensors"][TENSOR] == [7]
    _, facts = jepa(capsys, "cat", run, "--step", 2, "--tensor", TENSOR)
    assert facts["fingerprint"] != told["manifest"]["fingerprints"][TENSOR]
    assert (facts["shape"], facts["num_pieces"], facts["num_not_finite"]) == ([7], 2, 0)
    assert facts["minimum"] < facts["mean"] < facts["maximum"]
    assert math.isfinite(facts["std"])
    assert main(["ckpt", "cat", str(run), "--tensor", TENSOR]) == ExitCode.DONE
    assert "fingerprint" in capsys.readouterr().out
    code, told = jepa(capsys, "cat", run, "--tensor", "encoder.x")
    assert code == ExitCode.CONFIG
    assert "there are encoder.w, teacher.w" in told["error"]["message"]


def test_resume_starts_nothing_without_a_checkpoint_and_at_no_number_of_ranks_that_does_not_fit(
    run, capsys
):
    assert main(["resume", str(run), "--ranks", "3"]) == ExitCode.CONFIG
    told = capsys.readouterr().err
    assert "3 ranks cannot share the run's global batch of 8 clips" in told
    assert "1, 2, 4" in told
    layout.checkpoints_dir(run).rename(run / "elsewhere")
    before = content_of(run)
    assert main(["resume", str(run)]) == ExitCode.CONFIG
    assert "has no checkpoint to go on from" in capsys.readouterr().err
    assert content_of(run) == before
