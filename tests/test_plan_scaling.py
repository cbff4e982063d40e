"""The cost model obeys its own laws, agrees with published figures within stated errors."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipeline.checkpoint.interval import derive_interval
from pipeline.cli import main
from pipeline.config.load import SHIPPED_CONFIGS, load_config
from pipeline.errors import ExitCode
from pipeline.plan.cluster import Cluster
from pipeline.plan.evidence import ALL, H100_NODES, PAPER_HOURS, PAPER_SAVING
from pipeline.plan.failures import losses
from pipeline.plan.memory import trained_params
from pipeline.plan.scale_table import render_scaling
from pipeline.plan.scaling import Layout, Scaling, numbers_between, scale
from pipeline.plan.steptime import StepTime, compute_rate, stage_masks, stage_work, step_time
from pipeline.plan.transfer import gather_seconds, reduce_seconds
from pipeline.run import RunConfig
from tests.plain import tiny_config

CLUSTERS = SHIPPED_CONFIGS / "clusters"
# ViT-g of another trainer on 1 and 16 nodes of 8 (NVIDIA NeMo, ViT performance page): images per
# second, whose model FLOPs come to 29 % of an H100's peak and 45 % of an A100's.
NEMO = {"h100-ib.yaml": (1428, 21_561, 0.29), "a100-ib.yaml": (693, 10_644, 0.445)}


@cache
def config_of(name: str, *overrides: str) -> RunConfig:
    return load_config(SHIPPED_CONFIGS / name, RunConfig, overrides).config


@cache
def cluster_of(name: str, **changes) -> Cluster:
    return load_config(CLUSTERS / name, Cluster).config.model_copy(update=changes)


@cache
def scaled(name: str, cluster: str, *gpus: int, keep_recipe: bool = False) -> Scaling:
    return scale(config_of(name), cluster_of(cluster), gpus, keep_recipe=keep_recipe)


def only(scaling: Scaling) -> Layout:
    (layout,) = scaling.layouts
    return layout


def step_of(config: RunConfig, cluster: Cluster, num_gpus: int, index: int = 0) -> StepTime:
    work = stage_work(config, index, stage_masks(config, index), num_gpus, cluster.memory_gib)
    return step_time(config, index, work, cluster, num_gpus)


def test_gpu_hours_of_the_paper_are_predicted_within_a_third():
    ours = only(scaled("vitg16-384.yaml", "a100-ib.yaml", 128, keep_recipe=True))
    assert PAPER_HOURS.error == pytest.approx(-0.305, abs=0.005)
    # What users are told is what the model says today.
    assert ours.gpu_hours == pytest.approx(PAPER_HOURS.predicted, rel=0.005)


def test_the_saving_of_the_schedule_is_predicted_within_a_third():
    config = config_of("vitg16-384.yaml")
    last = config.stages[-1].model_copy(update={"steps": config.num_steps})
    full = config.model_copy(update={"stages": (last,)})
    cluster = cluster_of("a100-ib.yaml")
    ratio = (
        only(scale(full, cluster, [128], keep_recipe=True)).gpu_hours
        / only(scaled("vitg16-384.yaml", "a100-ib.yaml", 128, keep_recipe=True)).gpu_hours
    )
    assert PAPER_SAVING.error == pytest.approx(0.31, abs=0.005)
    assert ratio == pytest.approx(PAPER_SAVING.predicted, rel=0.005)


@pytest.mark.parametrize("name", NEMO)
def test_the_loss_from_1_to_16_nodes_is_near_that_of_another_trainers_vit_g(name):
    one, sixteen, busy = NEMO[name]
    scaling = scaled("vitg16.yaml", name, 8, 128, keep_recipe=True)
    predicted = scaling.layouts[1].efficiency
    # Measured: 94 and 96 %. Predicted: 99 % of both, since our micro-batches stay as they are.
    assert sixteen / one / 16 - predicted == pytest.approx(-0.045, abs=0.025)
    if name == "h100-ib.yaml":
        assert sixteen / one / 16 == pytest.approx(H100_NODES.published, abs=0.001)
        assert predicted == pytest.approx(H100_NODES.predicted, abs=0.005)
    hardware = compute_rate(cluster_of(name), 24 * 2048) / (cluster_of(name).peak_tflops * 1e12)
    assert hardware / busy - 1 == pytest.approx(0.0, abs=0.25)


def test_one_gpu_talks_to_nobody():
    step = step_of(config_of("vitl16.yaml"), Cluster(collective_overhead_us=0.0), 1)
    assert step.communication_seconds == 0.0
    assert step.moved_bytes == 0.0


def test_parts_of_a_step_add_up():
    for zero in range(4):
        step = step_of(config_of("vitg16.yaml", f"zero.stage={zero}"), Cluster(), 128)
        parts = step.compute_seconds + step.communication_seconds + step.update_seconds
        assert step.seconds == pytest.approx(parts + step.data_seconds)


def test_bytes_of_zero_3_are_three_gathers_and_a_scatter():
    config = config_of("vitg16.yaml")
    student, teacher = trained_params(config)
    step = step_of(config, Cluster(), 128)
    # bf16: the teacher's weights once, the student's forward and backward, its gradients.
    assert step.moved_bytes == pytest.approx(2 * 127 / 128 * (teacher + 3 * student))


def test_moving_a_gigabyte_takes_what_the_links_allow():
    quick = Cluster(
        intra_node_latency_us=0, inter_node_latency_us=0, collective_overhead_us=0,
        intra_node_gb_per_second=100, inter_node_gb_per_second=50,
    )  # fmt: skip
    assert gather_seconds(quick, 8, 1e9) == pytest.approx(7 / 8 / 100)
    # Over two nodes half of it has to come through the network.
    assert gather_seconds(quick, 16, 1e9) == pytest.approx(max(15 / 16 / 100, 1 / 2 / 50))
    assert gather_seconds(quick, 16, 0.0) == 0.0
    assert reduce_seconds(quick, 16, 1e9) == 2 * gather_seconds(quick, 16, 1e9)


def test_latency_grows_with_the_logarithm_in_a_tree_and_with_the_number_in_a_ring():
    slow = Cluster(inter_node_latency_us=10, intra_node_latency_us=0, collective_overhead_us=0)
    ring = slow.model_copy(update={"collective_growth": "ring"})
    assert gather_seconds(slow, 4096, 0.0) == pytest.approx(9 * 10e-6)
    assert gather_seconds(ring, 4096, 0.0) == pytest.approx(511 * 10e-6)


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(1.1, 100.0), gpus=st.sampled_from([8, 16, 128]))
def test_a_faster_network_or_more_overlap_never_makes_a_step_longer(factor, gpus):
    config, slow = config_of("vitl16.yaml"), cluster_of("cloud-ethernet.yaml")
    before = step_of(config, slow, gpus).seconds
    faster = {
        name: factor * getattr(slow, name)
        for name in ("inter_node_gb_per_second", "intra_node_gb_per_second")
    }
    assert step_of(config, slow.model_copy(update=faster), gpus).seconds <= before
    assert step_of(config, slow.model_copy(update={"overlap": 1.0}), gpus).seconds <= before


def test_a_thin_network_costs_more_on_many_nodes():
    thick = scaled("vitg16.yaml", "h100-ib.yaml", 8, 512)
    thin = scaled("vitg16.yaml", "cloud-ethernet.yaml", 8, 512)
    assert thin.layouts[0].gpu_hours == pytest.approx(thick.layouts[0].gpu_hours, rel=0.01)
    assert thin.layouts[1].gpu_hours > 1.05 * thick.layouts[1].gpu_hours


def test_too_few_cores_make_a_step_wait_for_data():
    config = config_of("vitl16.yaml")
    plenty = step_of(config, Cluster(), 128)
    few = Cluster(cores_per_gpu=plenty.cores_per_gpu / 2)
    assert step_of(config, few, 128).seconds == pytest.approx(2 * plenty.seconds)


def test_the_best_layout_fits_into_memory_and_beats_the_configurations():
    small = cluster_of("h100-ib.yaml", memory_gib=9.0)
    best = scale(config_of("vitg16.yaml"), small, [64])
    for stage in only(best).stages:
        assert stage.memory_gib <= 0.9 * 9.0
        assert stage.micro_batch * stage.accumulation * 64 == 3072
    # As it is configured it does not fit: 24 clips a GPU.
    kept = scale(config_of("vitg16.yaml"), small, [64], keep_recipe=True)
    assert kept.layouts == ()
    assert "needs" in kept.impossible[0].reason
    roomy = scaled("vitg16.yaml", "h100-ib.yaml", 64)
    recipe = scaled("vitg16.yaml", "h100-ib.yaml", 64, keep_recipe=True)
    assert only(roomy).hours <= only(recipe).hours


def test_numbers_that_do_not_divide_the_batch_are_named_with_those_that_do():
    scaling = scale(config_of("vitg16.yaml"), Cluster(), [4096])
    assert "3072 clips do not divide among them; 3072 would do" in scaling.impossible[0].reason
    numbers = numbers_between(1, 4096, 3072)
    assert numbers[0] == 1
    assert numbers[-1] == 4096
    assert all(3072 % number == 0 for number in numbers[:-1])


def test_losses_are_those_of_the_interval_that_a_run_derives_itself():
    config = config_of("vitg16.yaml", "checkpoint.every_steps=auto")
    step = step_of(config, Cluster(), 128)
    lost = losses(config, step, Cluster(), 128)
    assert lost.hours_between_failures == pytest.approx(50_700 / 128)
    chosen = derive_interval(lost.stall_seconds, lost.checkpoint_seconds, 50_700 / 128)
    assert lost.interval_seconds == chosen.seconds
    failure = 3600 * lost.hours_between_failures
    assert lost.restart_share == pytest.approx(Cluster().restart_seconds / failure)
    shares = lost.stalled_share + lost.repeated_share + lost.restart_share
    assert lost.goodput == pytest.approx(1 / (1 + shares))


def test_more_failures_and_rarer_saves_lose_more():
    step = step_of(config_of("vitg16.yaml"), Cluster(), 128)
    usual = losses(config_of("vitg16.yaml"), step, Cluster(), 128)
    rare = config_of("vitg16.yaml", "checkpoint.every_steps=100000")
    assert losses(rare, step, Cluster(), 128).goodput < usual.goodput
    frail = Cluster(gpu_hours_between_failures=1000.0)
    assert losses(config_of("vitg16.yaml"), step, frail, 128).goodput < usual.goodput
    in_line = config_of("vitg16.yaml", "checkpoint.background=false")
    assert losses(in_line, step, Cluster(), 128).stall_seconds == usual.checkpoint_seconds


def test_16000_gpus_fail_as_often_as_was_seen():
    lost = losses(config_of("vitg16.yaml"), step_of(tiny_config(), Cluster(), 1), Cluster(), 16_384)
    assert lost.hours_between_failures == pytest.approx(54 * 24 / 419, rel=0.01)


def test_tables_fit_a_terminal_and_say_what_is_chosen():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    for part in render_scaling(scaled("vitg16-384.yaml", "h100-ib.yaml", 64, 128)):
        console.print(part)
    text = console.export_text()
    assert "…" not in text
    told = ("Reckoned, not measured", "43,800 for 63,000 (-30%)", "11 for 8.4 (+31%)")
    for expected in ("128", "cooldown-64f-384", "goodput", "GPU-hours", "--keep-recipe"):
        assert expected in text
    assert all(words in " ".join(text.split()) for words in told)


def test_zero_2_pays_for_a_teacher_that_lies_whole_on_every_rank():
    config = config_of("vitg16.yaml", "zero.stage=2")
    student, teacher = trained_params(config)
    share, repeats = 127 / 128, 3072 // 128 // config.stages[0].micro_batch
    # Gradients of every micro-batch, the new weights, and the student's in fp32 by an all-reduce.
    moved = share * (repeats * 2 * student + 2 * student + 2 * 4 * teacher)
    assert step_of(config, Cluster(), 128).moved_bytes == pytest.approx(moved)


def test_the_command_draws_and_prints_json(tmp_path, capsys):
    config = str(SHIPPED_CONFIGS / "vitl16.yaml")
    cluster, picture = str(CLUSTERS / "cloud-ethernet.yaml"), tmp_path / "curve.png"
    words = ["plan", config, "--gpus", "64..128", "--cluster", cluster, "--picture", str(picture)]
    assert main([*words, "--json"]) == ExitCode.DONE
    document = json.loads(capsys.readouterr().out)
    layouts = document["scaling"]["layouts"]
    assert [layout["num_gpus"] for layout in layouts] == [64, 96, 128]
    assert document["scaling"]["cluster"]["inter_node_gb_per_second"] == 40.0
    assert [one["error"] for one in document["scaling"]["evidence"]] == [one.error for one in ALL]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", config, "--gpus", "64", "--cluster", cluster, "--json"]) == ExitCode.DONE
    both = json.loads(capsys.readouterr().out)
    assert both["machine"]["num_gpus"] == both["scaling"]["layouts"][0]["num_gpus"] == 64


@pytest.mark.parametrize(
    "words",
    [["--gpus", "8..4"], ["--gpus", "many"], ["--picture", "a.txt"], ["--picture", "a.png"]],
)
def test_mistakes_are_usage_errors(words, capsys):
    assert main(["plan", str(SHIPPED_CONFIGS / "tiny-cpu.yaml"), *words]) == ExitCode.USAGE
    assert f"expected {words[0]}" in capsys.readouterr().err


def test_every_shipped_cluster_loads():
    files = sorted(Path(CLUSTERS).glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert load_config(file, Cluster).config.name
