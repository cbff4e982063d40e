"""Plans of the shipped configurations agree with published figures and with measured networks."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline.cli import main
from pipeline.config.load import SHIPPED_CONFIGS, load_config
from pipeline.errors import ConfigError, ExitCode
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.plan.estimate import RunPlan, plan_run
from pipeline.plan.memory import layer_bytes_per_token
from pipeline.plan.table import duration, render, si
from pipeline.run import RunConfig

torch.set_num_threads(1)

SHIPPED = sorted(path.name for path in SHIPPED_CONFIGS.glob("*.yaml"))
FULL_RECIPES = ("vitl16.yaml", "vith16.yaml", "vitg16.yaml", "vitg16-384.yaml")


def _config(name: str, *overrides: str) -> RunConfig:
    return load_config(SHIPPED_CONFIGS / name, RunConfig, overrides).config


@cache
def _plan(name: str, *overrides: str, **machine) -> RunPlan:
    return plan_run(_config(name, *overrides), **machine)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads_and_can_be_planned(name):
    plan = _plan(name)
    assert plan.flops == pytest.approx(sum(stage.flops for stage in plan.stages))
    assert plan.clips == plan.steps * plan.global_batch
    assert plan.gpu_hours > 0
    assert all(len(stage.masks) == 2 for stage in plan.stages)


@pytest.mark.parametrize("name", FULL_RECIPES)
def test_full_recipes_follow_the_paper_and_not_the_leftovers_of_debugging(name):
    config = _config(name)
    first, last = config.stages
    assert config.global_batch == 3072
    assert (first.frames, first.resolution, first.micro_batch, first.fps) == (16, 256, 24, 4.0)
    assert (last.frames, last.fps, last.steps) == (64, 4.0, 12_000)
    assert first.steps > first.learning_rate.warmup_steps == 12_000
    assert config.learning_rate(1) == pytest.approx(1.00035e-4, rel=1e-5)
    assert config.learning_rate(first.steps) == 5.25e-4
    assert config.learning_rate(first.steps + 1) == pytest.approx(5.2496e-4, rel=1e-5)
    assert config.learning_rate(config.num_steps) == pytest.approx(1e-6)
    assert {config.weight_decay(step) for step in (1, config.num_steps)} == {0.04}
    assert config.activation_checkpointing
    assert config.optimizer.clip_gradient_norm is None


@pytest.mark.parametrize(
    ("name", "tflop_per_clip"), [("vitg16.yaml", (9.8, 62.9)), ("vitg16-384.yaml", (9.8, 212.0))]
)
def test_flops_per_clip_of_vit_g_equal_the_published_ones(name, tflop_per_clip):
    # For micro-batches of 24 and 6 clips. The mean of 128 sampled ones is good to 1 to 2 %.
    found = [stage.flops_per_clip / 1e12 for stage in _plan(name).stages]
    assert found == pytest.approx(list(tflop_per_clip), rel=0.02)


@pytest.mark.parametrize(
    ("size", "ratio"), [("vit_giant_xformers", 10.9), ("vit_huge", 11.4), ("vit_large", 12.2)]
)
def test_saving_over_full_size_throughout_equals_the_published_flops_ratio(size, ratio):
    plan = _plan("vitg16-384.yaml", f"objective.encoder.size={size}")
    assert plan.ratio_to_last_size == pytest.approx(ratio, rel=0.02)
    assert plan.gpu_hours_at_last_size == pytest.approx(plan.ratio_to_last_size * plan.gpu_hours)


def test_gpu_hours_of_vit_g_384_agree_with_the_papers_projection():
    # About 63,000 A100-hours (60 GPU-years / 8.4). That is 21 % of the A100's peak for our FLOPs,
    # a plausible utilisation with activation checkpointing, which costs a third again.
    plan = _plan("vitg16-384.yaml", utilisation=0.21, peak_tflops=312.0)
    assert plan.gpu_hours == pytest.approx(63_000, rel=0.03)
    assert plan.clips == 3072 * 252_000
    assert plan.wall_hours == pytest.approx(plan.gpu_hours / plan.machine.num_gpus)


def test_token_counts_and_mask_means_equal_the_published_ones():
    first, last = _plan("vitg16-384.yaml").stages
    assert (first.tokens_per_clip, last.tokens_per_clip) == (2048, 18_432)
    means = [(mask.context_mean, mask.target_mean) for mask in (*first.masks, *last.masks)]
    # Context means of 128 micro-batches: 4 sigma.
    assert [context for context, _ in means] == pytest.approx([497, 128, 5480, 1976], rel=0.16)
    assert [target for _, target in means] == pytest.approx([974, 1439, 9622, 13514], rel=0.05)


def test_default_number_of_gpus_is_the_most_that_divide_every_stage():
    plan = _plan("vitg16.yaml")
    assert plan.machine.num_gpus == 128
    assert [stage.accumulation for stage in plan.stages] == [1, 4]


def test_gpus_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match="stage pretrain-16f-256: global_batch 3072") as caught:
        _plan("vitg16.yaml", num_gpus=96)
    assert "64 or 128 processes" in caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_bytes_of_a_layer_equal_those_that_autograd_keeps(dtype, checkpointing):
    num_bytes = torch.finfo(dtype).bits // 8
    shallow, deep = (_kept_bytes(depth, checkpointing, dtype) for depth in (2, 4))
    num_tokens = 2 * 128
    dims = _small_encoder(2).dims
    expected = dims.width * num_bytes if checkpointing else layer_bytes_per_token(dims, num_bytes)
    # Statistics of norms and softmax are left out of the formula: under 2 %.
    assert (deep - shallow) / 2 / num_tokens == pytest.approx(expected, rel=0.02)


def test_memory_of_states_is_20_bytes_a_weight_shared_by_all_gpus():
    for gpus in (1, 8, 128):
        plan = _plan("vitg16.yaml", num_gpus=gpus)
        weights = plan.encoder_params + plan.predictor_params
        # bf16 weight and gradient, fp32 gradient, master, m, v; teacher in bf16 and fp32.
        expected = (weights * (2 + 2 + 4 + 4 + 4 + 4) + plan.encoder_params * (2 + 4)) / gpus
        assert plan.stages[0].memory.states_gib == pytest.approx(expected / 2**30)


def test_memory_shrinks_with_checkpointing_and_grows_with_a_lower_zero_stage():
    on = _plan("vitl16.yaml", num_gpus=8).stages
    off = _plan("vitl16.yaml", "activation_checkpointing=false", num_gpus=8).stages
    for with_it, without in zip(on, off, strict=True):
        assert with_it.memory.total_gib < without.memory.total_gib / 2
        assert with_it.memory.activations_gib == without.memory.activations_gib
    states = [
        _plan("vitl16.yaml", f"zero.stage={stage}", num_gpus=8).stages[0].memory.states_gib
        for stage in (0, 1, 2, 3)
    ]
    assert states == sorted(states, reverse=True)
    assert states[0] == pytest.approx(8 * states[3])


def test_a_long_window_and_a_smaller_last_stage_are_pointed_out():
    assert any("last 16 seconds" in text for text in _plan("vitg16.yaml").warnings)
    assert _plan("tiny-cpu.yaml").warnings == ()
    reverse = _plan("tiny-cpu.yaml", "stages.2.resolution=48")
    assert any("fewer tokens per clip than an earlier one" in text for text in reverse.warnings)


def test_tables_fit_80_columns_and_show_the_totals():
    console = Console(width=80, record=True, force_terminal=False)
    for part in render(_plan("vitg16-384.yaml")):
        console.print(part)
    text = console.export_text()
    assert "…" not in text
    for expected in ("18,432", "252,000", "774M", "212T", "10.9", "cooldown-64f-384", "128 GPUs"):
        assert expected in text


def test_the_command_prints_json_that_holds_the_plan(capsys):
    path = str(SHIPPED_CONFIGS / "tiny-cpu.yaml")
    assert main(["plan", path, "stages.0.steps=27", "--gpus", "1", "--json"]) == ExitCode.DONE
    printed = json.loads(capsys.readouterr().out)
    assert printed["stages"][0]["steps"] == 27
    assert printed["steps"] == 87
    assert printed["machine"]["num_gpus"] == 1


@pytest.mark.parametrize(
    "flags", [["--gpus", "0"], ["--utilisation", "40"], ["--peak-tflops", "-1"]]
)
def test_impossible_machines_are_usage_errors(flags, capsys):
    path = str(SHIPPED_CONFIGS / "tiny-cpu.yaml")
    assert main(["plan", path, *flags]) == ExitCode.USAGE
    assert f"expected {flags[0]}" in capsys.readouterr().err


def test_a_missing_file_is_a_usage_error(capsys):
    assert main(["plan", str(Path("no-such.yaml"))]) == ExitCode.USAGE
    assert "no-such.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.001, "less than a minute"), (0.5, "30 min"), (5.41, "5 h 25 min"), (47.99, "2 d 0 h")],
)
def test_durations_read_naturally(hours, text):
    assert duration(hours) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (999.6, "1k"), (2048e9, "2.05T"), (7.8e21, "7.8Z")]
)
def test_large_numbers_have_a_prefix(value, text):
    assert si(value) == text


def _small_encoder(depth: int) -> EncoderConfig:
    return EncoderConfig(size="vit_tiny", width=256, heads=4, depth=depth)


def _kept_bytes(depth: int, checkpointing: bool, dtype: torch.dtype) -> int:
    """Bytes of all storages that autograd saves in a forward pass, weights left out."""
    encoder = Encoder(
        _small_encoder(depth), attention=AttentionConfig(), checkpoint_activations=checkpointing
    ).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = encoder(torch.randn(2, 3, 4, 128, 128, dtype=dtype))
    assert output.shape == (2, 128, 256)
    return sum(
        tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights
    )
