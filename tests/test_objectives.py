"""Every objective found keeps the contract that the loop, probes and reports rely on."""

import dataclasses
import typing

import pytest
import torch

from pipeline.clip import ClipBatch, Progress
from pipeline.data.layout import Member
from pipeline.objectives import (
    AnyObjectiveConfig,
    build_objective,
    objective_kinds,
    objective_needs,
)
from pipeline.objectives.base import BuildOptions, Gate, Objective, ObjectiveConfig
from pipeline.optim import parameter_groups
from tests.plain import noise_batch, plans, progress_of, tiny_config

OPTIONS = BuildOptions(attention=tiny_config().attention, checkpoint_activations=False)
SMALL = {
    "jepa": tiny_config().objective,
}


@pytest.fixture(params=objective_kinds())
def config(request) -> ObjectiveConfig:
    assert request.param in SMALL, f"give {request.param} a small configuration for this test"
    return SMALL[request.param]


def build(config: ObjectiveConfig) -> tuple[Objective, ClipBatch, Progress]:
    torch.manual_seed(0)
    run = tiny_config()
    plan = plans(run, 0, 1, 1)[0]
    return build_objective(config, OPTIONS), noise_batch(plan, 0), progress_of(run, plan)


def test_an_objective_is_found_by_the_name_of_its_file(config):
    literal = typing.get_args(type(config).model_fields["kind"].annotation)
    assert literal == (config.kind,)
    assert issubclass(type(config), typing.get_args(AnyObjectiveConfig) or AnyObjectiveConfig)


def test_the_loss_is_a_finite_scalar_whose_gradient_reaches_every_trained_parameter(config):
    objective, batch, progress = build(config)
    losses = objective.loss(batch, progress)
    assert losses.total.shape == ()
    assert losses.total.isfinite()
    assert all(term.shape == () for term in losses.terms.values())
    losses.total.backward()
    for name, parameter in objective.modules().named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_same_batch_gives_the_same_loss(config):
    first, batch, progress = build(config)
    second, _, _ = build(config)
    assert first.loss(batch, progress).total == second.loss(batch, progress).total


def test_frozen_networks_are_in_no_parameter_group_and_averaged_pairs_have_one_shape(config):
    objective, _, _ = build(config)
    groups = parameter_groups(objective.modules().items())
    trained = {id(p) for group in groups for p in group["params"]}
    expected = {id(p) for p in objective.modules().parameters() if p.requires_grad}
    assert trained == expected
    assert len(groups) >= 2
    for student, teacher in objective.averaged_pairs():
        assert not any(p.requires_grad for p in teacher.parameters())
        shapes = [[p.shape for p in module.parameters()] for module in (student, teacher)]
        assert shapes[0] == shapes[1]


def test_the_encoder_is_one_of_the_modules_and_what_is_declared_can_be_read(config):
    objective, _, _ = build(config)
    assert any(objective.encoder() is module for module in objective.modules().values())
    assert objective_needs(config) <= {str(member) for member in Member}
    assert all(
        dataclasses.is_dataclass(gate) and isinstance(gate, Gate) for gate in objective.gates
    )


def test_flops_grow_with_tokens_and_with_what_masks_keep(config):
    small, large = config.grid(4, 32), config.grid(8, 32)
    kept = [(8.0, 16.0)]
    assert config.training_flops(small, kept) < config.training_flops(large, kept)
    assert config.training_flops(small, kept) < config.training_flops(small, [(16.0, 16.0)])


def test_two_masks_of_unequal_size_weigh_equally():
    objective, batch, progress = build(SMALL["jepa"])
    losses = objective.loss(batch, progress)
    sizes = {mask.target_BK.shape[1] for mask in batch.masks}
    assert len(sizes) == 2
    torch.testing.assert_close(losses.total, sum(losses.terms.values()) / 2)


def test_targets_are_normalised_over_channels_and_carry_no_gradient():
    objective, batch, progress = build(SMALL["jepa"])
    features_ND = objective.loss(batch, progress).features_ND
    assert not features_ND.requires_grad
    torch.testing.assert_close(
        features_ND.mean(dim=1), torch.zeros(len(features_ND)), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        features_ND.std(dim=1, correction=0), torch.ones(len(features_ND)), atol=1e-3, rtol=0
    )
