"""Faults of the loss, in real runs of two ranks: nothing poisoned, everything told."""

import json

import pytest

from pipeline.checkpoint import layout
from pipeline.errors import ExitCode
from pipeline.track.metrics import read_metrics
from pipeline.track.rewinds import read_rewinds
from tests.running import faulty, finish, long_stage, reasons, write_config
from tests.shards import write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards")
    write_dataset(folder / "data", 24)
    return folder


@pytest.fixture(scope="module")
def spoilt(folder):
    """Steps 3 and 4 cannot be taken; every step is saved."""
    faults = [{"rank": 1, "step": 3, "fault": "nan"}, {"step": 4, "fault": "inf_gradient"}]
    checkpoint = {"every_steps": 1, "keep_last": 20}
    config = write_config(folder, "spoilt", checkpoint=checkpoint)
    code, output = finish(faulty(faults, folder / "spoilt", "train", config))
    assert code == ExitCode.DONE, output
    return folder / "spoilt"


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_naming_rank_and_term(spoilt):
    told = reasons(spoilt, "skip")
    assert told[0] == "step 3 skipped on all ranks: rank 1, loss_mask_0 is nan"
    assert told[1] == "step 4 skipped on all ranks: the gradient is not finite"
    skipped = [step.report.step for step in read_metrics(spoilt) if step.report.skipped]
    assert skipped == [3, 4]


def test_a_skipped_step_leaves_weights_moments_and_teacher_bit_for_bit(spoilt):
    prints = {
        commit.step: layout.read_manifest(commit.path).fingerprints
        for commit in layout.list_commits(spoilt)
    }
    assert prints[3] == prints[2]
    assert prints[4] == prints[2]
    assert any(name.startswith("teacher.") for name in prints[2])
    changed = [name for name, value in prints[5].items() if value != prints[4][name]]
    assert len(changed) > len(prints[5]) / 2, "the run goes on after it"


@pytest.fixture(scope="module")
def rewound(folder):
    """One rank, a spike at step 30, told to go back and leave out two steps on either side."""
    guards = {"on_spike": "rewind", "spike_window_steps": 16, "spike_skip_steps": 2}
    changes = {
        "stages": long_stage(36, micro_batch=8),
        "guards": {**guards, "spike_sigmas": 30.0},
        "checkpoint": {"every_steps": 6, "keep_last": 20},
        "data": {"workers": 0},
    }
    config = write_config(folder, "rewound", **changes)
    faults = [{"step": 30, "fault": "spike"}]
    code, output = finish(faulty(faults, folder / "rewound", "train", config, ranks=1))
    assert code == ExitCode.DONE, output
    return folder / "rewound"


def test_a_spike_is_rewound_and_the_steps_around_it_are_left_out_on_record(rewound):
    (rewind,) = read_rewinds(rewound)
    assert (rewind.spike_step, rewind.to_step) == (30, 24)
    assert (rewind.first_step, rewind.last_step) == (28, 32)
    assert rewind.is_done
    steps = [step.report.step for step in read_metrics(rewound)]
    assert steps == [*range(1, 28), *range(33, 37)]
    (told,) = reasons(rewound, "rewind")
    assert "going back to step 24, leaving out steps 28 to 32" in told


def test_taking_a_rewound_run_up_again_leaves_out_the_same_steps(rewound):
    before = [(s.report.step, s.report.loss.hex()) for s in read_metrics(rewound)]
    words = ("resume", rewound, "--step", 24)
    code, output = finish(faulty([], rewound, *words, ranks=1))
    assert code == ExitCode.DONE, output
    assert [(s.report.step, s.report.loss.hex()) for s in read_metrics(rewound)] == before


def test_a_crash_loop_ends_with_its_own_code_and_the_last_error(folder):
    config = write_config(folder, "loop", data={"workers": 0}, stages=long_stage(4, micro_batch=8))
    run, faults = folder / "loop", [{"step": 1, "fault": "raise"}]
    codes = []
    for _ in range(2):
        code, output = finish(faulty(faults, run, "train", config, "--or-resume", ranks=1))
        codes.append(code)
    info = json.loads((run / "run.json").read_text())
    assert codes == [ExitCode.BUG] * 2
    (run / "run.json").write_text(json.dumps({**info, "starts": [info["starts"][-1]] * 3}))
    code, output = finish(faulty(faults, run, "train", config, "--or-resume", ranks=1))
    assert code == ExitCode.NO_PROGRESS, output
    assert "started 3 times from step 0" in output
    assert "ValueError: on order at step 1" in output
    code, output = finish(faulty([], run, "resume", run, "--retry", ranks=1))
    assert code == ExitCode.DONE, output
