"""What `jepa bench` measures: tiny runs of every verb, and figures that add up."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.reference_step import ReferenceStep
from benchmarks.step import largest_difference, run_rounds
from pipeline.bench.ablate import ablations, measure_ablation, measure_each
from pipeline.bench.batches import noise_batches
from pipeline.bench.loader import measure_loader
from pipeline.bench.stages import StageFigures, schedule_figures
from pipeline.bench.step import OwnStep, initial_weights, measuring
from pipeline.checkpoint.fingerprint import fingerprint_pieces
from pipeline.cli import main
from pipeline.config.load import resolved_yaml
from pipeline.errors import ExitCode
from tests.plain import tiny_config
from tests.shards import write_dataset

CPU = torch.device("cpu")
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(scope="module")
def group():
    torch.set_num_threads(1)
    with measuring():
        yield


def run_alone(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A process outside the group that the tests here share."""
    alone = {k: v for k, v in os.environ.items() if k not in GROUP}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=alone)


def test_the_verbs_measure_and_write_what_they_measured(tmp_path):
    config, out = tmp_path / "tiny.yaml", tmp_path / "stages.json"
    config.write_text(resolved_yaml(tiny_config()))
    command = [sys.executable, "-m", "pipeline.cli", "bench", "stages", str(config)]
    words = ["track.peak_tflops=10.0", "--rounds", "1", "--json", str(out)]
    done = run_alone([*command, *words])
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert [stage["stage"] for stage in written["figures"]["stages"]] == ["short", "long"]
    assert written["machine"]["cores"] >= 1
    for stage in written["figures"]["stages"]:
        seconds = stage["gradient_seconds"] + stage["update_seconds"]
        flops = stage["flops_per_clip"] * stage["clips"]
        assert stage["mfu"] == pytest.approx(flops / seconds / 1e13)
    assert "times as many" in done.stdout


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_our_step_and_the_straightforward_one_have_the_same_losses(group, zero_stage):
    config = tiny_config(zero_stage)
    batches = noise_batches(config, 0, CPU, 2)
    own, reference = OwnStep(config, CPU), ReferenceStep(config, initial_weights(config), CPU)
    # Its average moves by the momentum of a run's first step; ours follows the run's ramp.
    steps = config.num_steps
    sides = {
        "reference": lambda batch, n: reference.take(batch, n, 0.9 + (n - 1) / steps * 0.05),
        "ours": lambda batch, _: own.take(batch).loss,
    }
    _, losses = run_rounds(sides, batches, 1)
    assert len(set(losses["ours"])) == len(losses["ours"]), "the loss must move"
    assert largest_difference(losses, "reference") < 1e-5


def test_every_ablation_computes_the_same_loss(group):
    config = tiny_config(2)
    batch = noise_batches(config, 0, CPU, 1)[0]
    for other in ablations(config):
        if "compile" in other.changes:
            continue  # A minute of compiler for nothing that other tests do not cover.
        step = OwnStep(config.model_copy(update=other.changes), CPU)
        if other.alter is not None:
            other.alter(step)
        losses = [step.take(batch).loss for _ in range(2)]
        assert losses == pytest.approx(_losses_as_configured(config, batch), rel=1e-5), other.name


def _losses_as_configured(config, batch, known={}):  # noqa: B006
    if not known:
        step = OwnStep(config, CPU)
        known["losses"] = [step.take(batch).loss for _ in range(2)]
    return known["losses"]


def test_an_ablation_is_measured_with_its_own_setting(group):
    config = tiny_config(2)
    recomputed = next(one for one in ablations(config) if one.name == "all blocks recomputed")
    figures = measure_ablation(config, recomputed, 0, CPU, 1)
    assert figures.setting["recomputed_blocks"] == {"encoder": 2, "predictor": 1}
    assert 0.1 < figures.recomputed_share < 1 / 3


def test_every_ablation_has_a_process_of_its_own(monkeypatch):
    for name in GROUP:  # of the group that other tests share
        monkeypatch.delenv(name, raising=False)
    # Another one than this: what DeepSpeed keeps of it ends with it.
    name, figures = next(measure_each(tiny_config(3), 1, 1))
    assert name == "as configured"
    assert figures is not None
    assert (figures.stage, figures.clips) == ("long", 1)
    assert figures.gradient_seconds > 0


def test_a_loaders_clips_are_told_per_second_of_its_workers_too(tmp_path):
    data = {"sources": [{"path": str(write_dataset(tmp_path / "data", 8))}], "workers": 1}
    config = tiny_config(data=data)
    figures = measure_loader(config, 1, 4)
    assert figures.clips == 4 * config.stages[1].micro_batch
    # Decoding a clip takes at least a tenth of a millisecond, and the worker does it.
    assert 0 < figures.clips_per_cpu_second < 10_000


def test_figures_that_cannot_be_kept_are_told_before_anything_is_measured(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(resolved_yaml(tiny_config()))
    words = ["bench", "attention", str(config), "--json", "/proc/nowhere/out.json"]
    assert main(words) == ExitCode.STORAGE
    assert "/proc/nowhere/out.json: cannot be written" in capsys.readouterr().err
    assert main(["bench", "stages", str(config), "--devices", "3"]) == ExitCode.CONFIG
    assert "not a multiple" in capsys.readouterr().err


def test_a_schedule_of_equal_stages_saves_nothing_and_a_cheap_one_its_share():
    config = tiny_config()
    short, long = (stage.model_copy(update={"micro_batch": 2}) for stage in config.stages)
    config = config.model_copy(update={"stages": (short, long)})
    last = StageFigures(
        stage="long",
        clips=2,
        tokens_per_clip=144,
        gradient_seconds=2.0,
        update_seconds=1.0,
        spread_ms={},
        clips_per_second=1.0,
        tokens_per_second=144.0,
        flops_per_clip=1.0,
        mfu=None,
        recomputed_share=0.0,
        peak_memory_gib=None,
        setting={},
    )
    # Global batch 8 in micro-batches of 2: a step is 4 gradients and an update.
    equal = schedule_figures(config, [last, last])
    assert equal.time_ratio == 1.0
    assert equal.device_hours == pytest.approx(6 * (4 * 2.0 + 1.0) / 3600)
    cheap = schedule_figures(config, [replace(last, gradient_seconds=0.5), last])
    assert cheap.time_ratio == pytest.approx(6 * 9.0 / (3 * 3.0 + 3 * 9.0))
    assert cheap.flop_ratio > 1.0


def test_recomputation_in_one_stage_changes_no_bit_of_any_weight(group):
    saved = []
    for recompute in (None, True):
        config = tiny_config(3)
        short, long = config.stages
        changed = long.model_copy(update={"activation_checkpointing": recompute})
        config = config.model_copy(update={"stages": (short, changed)})
        step = OwnStep(config, CPU)
        for stage in (0, 1, 0, 1):
            step.take(noise_batches(config, stage, CPU, 1)[0])
            expected = 2 if recompute and stage == 1 else 0
            assert step.engine.objective.modules()["encoder"].num_recomputed_blocks == expected
        saved.append(fingerprint_pieces(step.engine.pieces()))
    assert saved[0] == saved[1]
    assert saved[0], "fingerprints of every tensor"


def test_an_engine_is_built_without_libraries_that_it_does_not_use():
    program = (
        "import sys, torch\n"
        "from pipeline.bench.step import OwnStep, measuring\n"
        "from tests.plain import tiny_config\n"
        "with measuring() as device:\n"
        "    OwnStep(tiny_config(3), device)\n"
        "unused = {'mlflow', 'torch._inductor.compile_fx'}\n"
        "print(sorted(unused & set(sys.modules)), torch.compile.__module__)\n"
    )
    done = run_alone([sys.executable, "-c", program])
    assert done.stdout.splitlines()[-1:] == ["[] torch"], done.stderr
