"""Whole runs through the command line: stop, resume, refuse, fail with the right exit code."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import iterate_weights
from pipeline.errors import ExitCode
from pipeline.track.lease import Ownership
from pipeline.track.metrics import read_events, read_metrics
from tests.running import (
    LIMIT_SECONDS,
    faulty,
    finish,
    jepa,
    long_stage,
    rank_pids,
    wait_for_step,
    write_config,
)
from tests.shards import write_dataset

# Where workers of the loader take part; starting their processes takes seconds.
WORKERS = {"workers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "data", 24)
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    config = write_config(folder, "whole", data=WORKERS)
    code, output = finish(jepa("train", config, "--ranks", 2))
    assert code == ExitCode.DONE, output
    return folder / "whole"


@pytest.fixture(scope="module")
def stopped(folder) -> tuple[Path, int, str]:
    """A run that was sent SIGTERM in its first stage, and resumed to its end."""
    config = write_config(folder, "stopped", data=WORKERS)
    # On a busy machine so short a run would be over before it hears of the signal.
    late = [{"rank": 0, "step": 3, "fault": "await_signal"}]
    process = faulty(late, folder / "stopped", "train", config)
    wait_for_step(folder / "stopped", 1)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == ExitCode.SAVED_RUN_AGAIN, output
    at = layout.list_commits(folder / "stopped")[-1].step
    code, output = finish(jepa("resume", folder / "stopped"))
    assert code == ExitCode.DONE, output
    return folder / "stopped", at, output


def test_a_stopped_and_resumed_run_has_the_very_losses_of_an_uninterrupted_one(whole, stopped):
    run, at, _ = stopped
    assert 1 <= at < 6, "it was stopped in the middle"
    expected = [(s.report.step, s.report.loss.hex()) for s in read_metrics(whole)]
    found = [(s.report.step, s.report.loss.hex()) for s in read_metrics(run)]
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert found == expected


def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(whole, stopped):
    run, _, _ = stopped
    ends = [layout.list_commits(folder)[-1] for folder in (whole, run)]
    assert [end.step for end in ends] == [6, 6]
    expected, found = (dict(iterate_weights(end.path)) for end in ends)
    assert all(found[name].equal(weight) for name, weight in expected.items())
    assert any(name.startswith("teacher.") for name in expected)


def test_the_first_and_the_last_checkpoints_stay_and_others_go(whole):
    assert [commit.step for commit in layout.list_commits(whole)] == [0, 4, 6]


def test_events_tell_the_story_of_a_run(stopped):
    run, at, _ = stopped
    names = [event.name for event in read_events(run)]
    assert names[0] == "start"
    assert names.index("stop") < names.index("resume") < names.index("end")
    assert next(e for e in read_events(run) if e.name == "resume").step == at


def test_one_rank_without_workers_sees_the_same_losses_within_rounding(folder, whole):
    code, output = finish(jepa("train", write_config(folder, "alone")))
    assert code == ExitCode.DONE, output
    expected = [s.report.loss for s in read_metrics(whole)]
    found = [s.report.loss for s in read_metrics(folder / "alone")]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_bf16_run_taken_up_from_an_older_step_repeats_its_losses_bit_for_bit(folder):
    code, output = finish(jepa("train", write_config(folder, "half", precision="bf16")))
    assert code == ExitCode.DONE, output
    run = folder / "half"
    before = {s.report.step: s.report.loss.hex() for s in read_metrics(run)}
    last = dict(iterate_weights(layout.list_commits(run)[-1].path))
    code, output = finish(jepa("resume", run, "--step", 4))
    assert code == ExitCode.DONE, output
    assert {s.report.step: s.report.loss.hex() for s in read_metrics(run)} == before
    again = dict(iterate_weights(layout.list_commits(run)[-1].path))
    assert all(again[name].equal(weight) for name, weight in last.items())
    assert list((run / "checkpoints").glob("aside-step-00000006-*")), "the old last one is kept"
    # fp32 weights behind a bf16 network: an average of bf16 steps would be multiples of 2^-8.
    teacher = last["teacher.blocks.0.norm1.weight"]
    assert not teacher.equal(teacher.bfloat16().float())


def test_a_run_of_two_ranks_goes_on_with_one_at_the_same_clips_and_says_that_it_arrived(
    folder, whole
):
    run = shutil.copytree(whole, folder / "fewer")
    code, output = finish(jepa("resume", run, "--step", 4, "--ranks", 1))
    assert code == ExitCode.DONE, output
    assert "saved with 2, running 1: resharded, fingerprints equal" in output
    expected = [s.report.loss for s in read_metrics(whole)]
    assert [s.report.loss for s in read_metrics(run)] == pytest.approx(expected, rel=1e-5)
    worlds = [layout.read_manifest(c.path).world_size for c in layout.list_commits(run)]
    assert worlds == [2, 2, 1], "the commits of steps 0 and 4 are the ones that were there"
    assert json.loads((run / "run.json").read_text())["starts"][-1]["world_size"] == 1


def test_torchrun_starts_the_same_run(folder, whole):
    config = write_config(folder, "torchrun")
    words = ["--nproc_per_node=2", "--rdzv_endpoint=127.0.0.1:0", "--rdzv_backend=c10d"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "pipeline.cli"]
    done = subprocess.run(
        [*command, "train", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [s.report.loss.hex() for s in read_metrics(whole)]
    assert [s.report.loss.hex() for s in read_metrics(folder / "torchrun")] == expected


def test_evaluators_need_neither_deepspeed_nor_ray_nor_mlflow(whole, tmp_path):
    code = (
        "import sys\n"
        "for name in ('deepspeed', 'ray', 'mlflow'): sys.modules[name] = None\n"
        "import pipeline.commands.probe\n"
        "from pipeline.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    for words in (["ckpt", "verify", whole], ["status", whole], ["report", whole, "--no-upload"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (whole / "report.html").stat().st_size > 10_000


def test_a_run_is_never_started_over_an_existing_one(folder, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    code, output = finish(jepa("train", folder / "whole.yaml"))
    assert code == ExitCode.USAGE
    assert "jepa resume" in output
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_resuming_what_is_no_run_or_has_no_such_step_is_refused(folder, whole):
    code, output = finish(jepa("resume", folder / "no-such-run"))
    assert code == ExitCode.USAGE
    assert "no-such-run" in output
    code, output = finish(jepa("resume", whole, "--step", 5))
    assert code == ExitCode.CONFIG
    assert "there are: 0, 4, 6" in output


def test_a_changed_dataset_is_refused_on_resume(folder, whole):
    config = whole / "config.yaml"
    text = config.read_text()
    write_dataset(folder / "other", 24, first_seed=100)
    config.write_text(text.replace(str(folder / "data"), str(folder / "other")))
    code, output = finish(jepa("resume", whole, "--step", 4))
    config.write_text(text)
    assert code == ExitCode.CONFIG
    assert "other samples" in output
    assert [c.step for c in layout.list_commits(whole)] == [0, 4, 6], "nothing was set aside"


def test_a_changed_dataset_may_be_gone_on_with_on_purpose_and_on_record(folder, whole):
    run = shutil.copytree(whole, folder / "changed")
    write_dataset(folder / "changed-data", 24, first_seed=100)
    config = run / "config.yaml"
    text = config.read_text().replace(str(folder / "data"), str(folder / "changed-data"))
    config.write_text(text)
    words = ("resume", run, "--step", 4, "--ranks", 1, "--allow-dataset-change")
    code, output = finish(jepa(*words))
    assert code == ExitCode.DONE, output
    (told,) = [event for event in read_events(run) if event.name == "dataset_changed"]
    assert "other samples" in told.details["reason"]
    old, new = ([s.report.loss for s in read_metrics(folder)] for folder in (whole, run))
    assert new[:4] == old[:4]
    assert new[4] != pytest.approx(old[4], rel=1e-5), "other clips"


def test_too_many_bad_samples_end_the_run_with_their_names_in_quarantine(folder):
    broken = write_dataset(folder / "broken", 24, first_seed=300)
    for shard in broken.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        for place in range(2048, len(content), 1500):
            content[place] ^= 0xFF
        shard.write_bytes(content)
    data = {
        **WORKERS,
        "sources": [{"path": str(broken)}],
        "max_bad_samples": 2,
        "max_bad_fraction": 0.0,
    }
    code, output = finish(jepa("train", write_config(folder, "bad-data", data=data)))
    assert code == ExitCode.DATA, output
    lines = (folder / "bad-data" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) >= 3
    assert {"position", "shard", "key", "reason"} <= json.loads(lines[0]).keys()


def test_or_resume_starts_continues_and_refuses_another_configuration(folder, whole):
    code, output = finish(jepa("train", folder / "whole.yaml", "--or-resume"))
    assert code == ExitCode.DONE
    assert "is finished" in output
    code, output = finish(jepa("train", folder / "whole.yaml", "seed=7", "--or-resume"))
    assert code == ExitCode.CONFIG
    assert "seed" in output


def test_a_second_job_on_a_run_is_refused(folder, whole):
    owner = Ownership()
    owner.take(whole)
    code, output = finish(jepa("resume", whole, "--step", 4))
    owner.release()
    assert code == ExitCode.USAGE, output
    assert f"in use by another job: process {os.getpid()} on {socket.gethostname()}" in output
    assert [c.step for c in layout.list_commits(whole)] == [0, 4, 6], "nothing was set aside"


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(folder):
    rate = {"shape": "constant", "peak": 1e18}
    stages = [
        {
            **{"name": "hot", "steps": 20, "frames": 4, "fps": 4.0, "resolution": 32},
            "micro_batch": 8,
            "learning_rate": rate,
        }
    ]
    code, output = finish(jepa("train", write_config(folder, "hot", stages=stages)))
    assert code == ExitCode.NUMERICS, output
    assert "11 steps in a row were left out, allowed are 10" in output
    for commit in layout.list_commits(folder / "hot"):
        state = dict(iterate_weights(commit.path))
        assert all(weight.isfinite().all() for weight in state.values())


def test_a_killed_rank_ends_the_others_with_peer_lost(folder):
    process = jepa("train", write_config(folder, "killed", stages=long_stage()), "--ranks", 2)
    wait_for_step(folder / "killed", 3)
    os.kill(rank_pids(process)[1], signal.SIGKILL)
    code, output = finish(process)
    assert code == ExitCode.PEER_LOST, output
    assert layout.list_commits(folder / "killed"), "the last commit stands"
    told = [event for event in read_events(folder / "killed") if event.name == "fault"]
    assert told[-1].details["reason"] == "rank 1 was killed by signal 9 (SIGKILL)"
