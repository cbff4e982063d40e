"""Spikes, slow ranks and hanging ranks, found in made-up numbers whose truth is known."""

import json
import random
import subprocess
import sys

import pytest
import torch

from pipeline.engine.agree import RankPace
from pipeline.engine.hang import Beat, Watchdog, culprit
from pipeline.engine.last_words import LastWords, as_memory_full, as_peer_loss
from pipeline.engine.pace import PaceWatch
from pipeline.engine.spikes import Spike, SpikeWindow, plan_rewind
from pipeline.environment import read_launch
from pipeline.errors import ConfigError, ExitCode
from pipeline.limits import GuardsConfig
from pipeline.track.faults import read_faults
from pipeline.track.rewinds import steps_to_take
from tests.plain import tiny_config


def falling_losses(num, seed=0, noise=0.01):
    draw = random.Random(seed)
    return [0.4 + 0.3 / (1 + step / 50) + draw.gauss(0, noise) for step in range(num)]


def judge_all(losses, **settings):
    window = SpikeWindow(GuardsConfig(**settings))
    told = [window.judge(i, loss, first_of_stage=i == 0) for i, loss in enumerate(losses)]
    return [spike for spike in told if spike is not None]


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_falls_and_wobbles_is_no_spike_and_one_that_jumps_is(seed):
    losses = falling_losses(500, seed)
    assert judge_all(losses) == []
    losses[300] += 0.3
    (spike,) = judge_all(losses)
    assert spike.step == 300
    assert spike.sigmas > 6
    assert "the loss of step 300 is 0." in spike.words


def test_a_low_loss_and_the_first_steps_of_a_stage_are_no_spikes():
    losses = falling_losses(100)
    assert judge_all([*losses, 0.01]) == []
    assert judge_all([0.4] * 10 + [40.0]) == [], "too few to compare with"
    window = SpikeWindow(GuardsConfig())
    for step, loss in enumerate([*losses, *(3 * loss for loss in losses)]):
        assert window.judge(step, loss, first_of_stage=step in (0, 100)) is None


def test_a_loss_that_stays_up_becomes_the_new_level():
    told = judge_all([*falling_losses(200), *(1.0 + x for x in falling_losses(200))])
    assert 60 <= len(told) <= 70
    assert told[-1].step < 270, "half of the window of 128 later"


def test_a_window_that_was_saved_judges_like_one_that_was_not():
    losses = [*falling_losses(150), 0.9]
    whole, first = SpikeWindow(GuardsConfig()), SpikeWindow(GuardsConfig())
    for step, loss in enumerate(losses[:150]):
        whole.judge(step, loss, first_of_stage=False)
        first.judge(step, loss, first_of_stage=False)
    resumed = SpikeWindow(GuardsConfig(), json.loads(json.dumps(first.losses())))
    assert resumed.judge(150, 0.9, first_of_stage=False) == whole.judge(
        150, 0.9, first_of_stage=False
    )


@pytest.mark.parametrize(
    ("spike", "commits", "stage", "expected"),
    [
        (250, [0, 100, 200, 240], range(1, 1001), (200, 230, 270)),
        (210, [0, 100, 200], range(1, 1001), (100, 190, 230)),
        (15, [0], range(1, 1001), (0, 1, 35)),
        (105, [0, 100], range(101, 201), (0, 101, 125)),
        (195, [0, 100], range(101, 201), (100, 175, 199)),
    ],
)
def test_a_rewind_goes_back_before_what_it_leaves_out_and_stays_in_its_stage(
    spike, commits, stage, expected
):
    found = Spike(step=spike, loss=1.0, median=0.4, sigmas=9.0)
    plan = plan_rewind(found, commits, GuardsConfig(), stage)
    assert (plan.to_step, plan.first_step, plan.last_step) == expected
    taken = list(steps_to_take(1, 1000, (plan,)))
    assert len(taken) == 1000 - (expected[2] - expected[1] + 1)
    assert stage[-1] in taken, "a stage's last step is saved"


def paces(draw, num_ranks, slow=None, section="data", by=1.0):
    found = []
    for rank in range(num_ranks):
        times = {
            "data": abs(draw.gauss(0.01, 0.01)),
            "compute": 0.004 * draw.uniform(0.9, 1.2),
            "host": 0.002 * draw.uniform(0.5, 2.0) + (0.004 if rank == 0 else 0.0),
        }
        if rank == slow:
            times[section] = times[section] * by + (0.1 if section == "data" else 0.0)
        found.append(RankPace(**times))
    return found


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_500_clean_steps_raise_no_alarm(num_ranks):
    draw, watch = random.Random(num_ranks), PaceWatch(GuardsConfig())
    for _ in range(500):
        assert watch.watch(paces(draw, num_ranks), step_seconds=0.2) == []


@pytest.mark.parametrize(("section", "by"), [("data", 1.0), ("compute", 2.0)])
def test_a_slow_rank_is_told_once_with_section_host_and_score(section, by):
    draw = random.Random(0)
    watch = PaceWatch(GuardsConfig(), [f"gpu{rank:03d}" for rank in range(8)])
    told = []
    for _ in range(500):
        told += watch.watch(paces(draw, 8, slow=5, section=section, by=by), step_seconds=0.2)
    (straggler,) = told
    assert (straggler.rank, straggler.section, straggler.host) == (5, section, "gpu005")
    assert straggler.score < 0.6
    assert straggler.words.startswith(f"rank 5 on gpu005 is slow in {section}: ")


def beats(*places, number=1):
    return {
        rank: Beat(rank=rank, number=number, phase=phase, step=step, host=f"gpu{rank:03d}")
        for rank, (phase, step) in enumerate(places)
    }


def test_a_rank_without_a_new_heartbeat_is_the_culprit():
    before = beats(("compute", 12), ("compute", 12), ("compute", 12))
    after = beats(("compute", 12), ("compute", 12), ("compute", 12), number=2)
    after[1] = before[1]
    told = culprit(before, after, 3)
    assert told == (
        "rank 1 on gpu001 gives no sign of life since it was in compute of step 12: stopped, "
        "killed or its machine is lost"
    )
    del before[1], after[1]
    assert "rank 1 never gave a sign of life" in culprit(before, after, 3)


def test_of_ranks_that_all_live_the_one_behind_is_the_culprit():
    before = beats(("compute", 12), ("compute", 12), ("data", 12))
    after = beats(("compute", 12), ("compute", 12), ("data", 12), number=2)
    told = culprit(before, after, 3)
    assert told == "rank 2 on gpu002 is in data of step 12 and the others wait for it"
    after = beats(("compute", 12), ("data", 12), ("data", 12), number=2)
    told = culprit(before, after, 3)
    assert told == (
        "rank 1 on gpu001, rank 2 on gpu002 are in data of step 12 and the others wait for them"
    )


def test_ranks_that_are_all_at_one_place_wait_for_what_that_place_needs():
    def at(phase, ranks):
        places = [(phase, 12)] * ranks
        return culprit(beats(*places), beats(*places, number=2), ranks)

    free = "does not answer, or no processor is free (see the stacks)"
    assert at("agree", 2) == f"all ranks are in agree of step 12: a collective or a device {free}"
    assert at("compute", 1) == f"rank 0 on gpu000 is in compute of step 12: a device {free}"
    assert at("data", 2).startswith("all ranks are in data of step 12: the loader or the storage")
    assert "rank 0 on gpu000 is in log of step 12: the storage of the run does" in at("log", 1)


def test_the_limit_is_thirty_seconds_and_three_times_the_slowest_of_recent_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pipeline.engine.hang.time.monotonic", lambda: clock[0])
    stopping = [False]
    dog = Watchdog(
        rank=0, world_size=2, config=GuardsConfig(), is_stopping=lambda: stopping[0]
    )  # fmt: skip
    assert dog.limit_seconds == 1800.0, "start-up"
    dog.begin("step", 1, has_precedent=False)
    clock[0] += 50
    dog.begin("step", 2)
    assert dog.limit_seconds == 1800.0, "the first step compiles and does not count"
    clock[0] += 2.0
    dog.begin("step", 3)
    confirm = 2.0 + 2 / 200 + 2.0  # the time that naming the culprit takes is part of the promise
    assert dog.limit_seconds + confirm == pytest.approx(30 + 3 * 2.0)
    stopping[0] = True
    assert dog.limit_seconds + confirm == pytest.approx(8 + 3 * 2.0), "the grace is running out"
    dog.begin("save", 3, has_precedent=False)
    assert dog.limit_seconds == 1800.0, "the first save has no precedent"
    clock[0] += 0.1
    dog.begin("save", 4)
    clock[0] += 0.1
    dog.begin("save", 5, allowance=300.0)
    assert dog.limit_seconds > 300.0, "the copy is quick, but the last save is waited for"


HANGING = """
import sys, time
from pathlib import Path
from pipeline.engine.hang import Watchdog
from pipeline.limits import GuardsConfig
run = Path(sys.argv[1])
dog = Watchdog(rank=0, world_size=1, config=GuardsConfig(hang_seconds=5.0), is_stopping=bool)
dog.start()
dog.attach(run, 1)
def stuck_in_here():
    time.sleep(600)
for step in range(1, 4):
    dog.begin("step", step)
    time.sleep(0.05)
dog.enter("compute")
stuck_in_here()
"""


def test_a_process_that_hangs_ends_with_76_and_leaves_stacks_and_reason(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 76, done.stderr
    assert "stuck_in_here" in (tmp_path / "faults" / "stacks-rank-00000.txt").read_text()
    fault = json.loads((tmp_path / "faults" / "fault-1-0-watchdog.json").read_text())
    assert fault["reason"].startswith("hang: step 3 took more than")
    assert "is in compute of step 3: a device does not answer" in fault["reason"]
    assert (fault["phase"], fault["step"]) == ("compute", 3)


def test_a_gpu_that_is_full_is_told_with_the_stage_and_what_to_change():
    config, full = tiny_config(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore")
    assert as_memory_full(RuntimeError("else"), config, 1, is_first=True) is None
    first = as_memory_full(full, config, 4, is_first=True)
    assert isinstance(first, ConfigError)
    assert "Stage long with micro_batch 1" in str(first)
    assert "more" not in str(first)
    assert "activation_checkpointing=auto" in first.remedy
    # One that has gone well before may do so again: the scheduler counts it as a failure.
    later = as_memory_full(full, config, 2, is_first=False)
    assert later is not None
    assert later.exit_code == ExitCode.BUG


def test_a_lost_peer_is_told_without_the_library_s_own_places_and_guesses():
    said = RuntimeError(
        "[/__w/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5900: "
        "Connection reset by peer. This is typically caused by a remote worker hanging.\nGLHF!"
    )
    told = as_peer_loss(said, read_launch({}))
    assert str(told) == (
        "Rank 0 of 1 lost its peers: Read error [127.0.0.1]:5900: Connection reset by peer."
    )
    assert told is not None
    assert "jepa status" in told.remedy


def test_the_last_word_after_ctrl_c_twice_is_the_keyboard_s(tmp_path):
    dog = Watchdog(rank=0, world_size=1, config=GuardsConfig(), is_stopping=bool)
    words = LastWords(read_launch({}), dog)
    words.attach(tmp_path, 1)
    words.leave(KeyboardInterrupt())
    (fault,) = read_faults(tmp_path)
    assert (fault.exit_code, fault.reason) == (
        130, "Ctrl-C was pressed twice: ended at once, unsaved",
    )  # fmt: skip
