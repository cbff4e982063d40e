"""The sharded engine computes what a plain loop computes."""

import pytest
import torch

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import iterate_weights, load_encoder_state, verify
from tests.plain import PlainResult, plain_run, tiny_config
from tests.ranks import run_on_ranks

NUM_STEPS = 5
# fp32 with sums in another order; the largest difference seen is 3e-7 after five steps.
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def plain() -> PlainResult:
    torch.set_num_threads(1)
    return plain_run(tiny_config(), NUM_STEPS)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("zero3")
    arguments = {"zero_stage": 3, "num_steps": NUM_STEPS, "changes": {}}
    return out, run_on_ranks("tests.workers.zero_run", 2, out, arguments)


def test_zero3_on_two_ranks_gives_the_losses_of_a_plain_loop(plain, sharded):
    _, ranks = sharded
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["losses"] == pytest.approx(plain.losses, abs=TOLERANCE)
    assert len({round(loss, 4) for loss in plain.losses}) == NUM_STEPS, "the loss must move"


def test_zero3_gives_all_weights_of_a_plain_loop_teacher_norms_and_biases_included(plain, sharded):
    out, _ = sharded
    commit = layout.list_commits(out)[0]
    weights = dict(iterate_weights(commit.path))
    assert weights.keys() == plain.weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain.weights[name], atol=TOLERANCE, rtol=0.0, msg=name)
    started = plain_run(tiny_config(), 0).weights
    for name, weight in weights.items():
        if name.startswith("teacher."):
            assert not torch.equal(weight, started[name]), f"{name} never moved"


def test_the_live_copies_of_the_teachers_small_parameters_follow_the_average(plain, sharded):
    _, ranks = sharded
    for rank in ranks:
        assert rank["live"]
        for name, total in rank["live"].items():
            assert total == pytest.approx(
                plain.weights[f"{name}.weight"].abs().sum().item(), abs=1e-4
            )


def test_a_checkpoint_of_two_ranks_gives_the_teacher_without_deepspeed(plain, sharded):
    out, _ = sharded
    commit = layout.list_commits(out)[0]
    assert verify(commit.path) == []
    teacher = load_encoder_state(commit.path, "teacher")
    student = load_encoder_state(commit.path, "student")
    assert teacher.keys() == student.keys()
    name = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(teacher[name], plain.weights[f"teacher.{name}"], atol=1e-5, rtol=0)


def test_groups_are_encoder_and_predictor_with_and_without_decay(sharded):
    _, ranks = sharded
    groups = {group["name"]: group["weight_decay"] for group in ranks[0]["groups"]}
    assert set(groups) == {
        "encoder/decay",
        "encoder/no_decay",
        "predictor/decay",
        "predictor/no_decay",
    }
    assert groups["encoder/no_decay"] == 0.0 < groups["encoder/decay"]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_the_other_zero_stages_give_the_same(plain, tmp_path, zero_stage):
    arguments = {"zero_stage": zero_stage, "num_steps": NUM_STEPS, "changes": {}}
    ranks = run_on_ranks("tests.workers.zero_run", 2, tmp_path, arguments)
    assert ranks[0]["losses"] == pytest.approx(plain.losses, abs=TOLERANCE)
    weights = dict(iterate_weights(layout.list_commits(tmp_path)[0].path))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain.weights[name], atol=TOLERANCE, rtol=0.0, msg=name)
