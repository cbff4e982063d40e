"""Fused AdamW is AdamW."""

import torch
from torch import nn

from pipeline.optim import OptimizerConfig, adamw, parameter_groups


def _trained(*, fused: bool) -> list[torch.Tensor]:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5))
    config = OptimizerConfig(betas=(0.9, 0.95))
    optimizer = adamw(parameter_groups([("network", network)]), config)
    for number, group in enumerate(optimizer.param_groups):
        group["fused"], group["weight_decay"] = fused, 0.1 * (number == 0)
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.zero_grad()
        network(torch.randn(16, 7)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in network.parameters()]


def test_fused_adamw_takes_the_steps_of_plain_adamw_within_rounding():
    for fused, plain in zip(_trained(fused=True), _trained(fused=False), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_training_uses_the_fused_one():
    network = nn.Linear(2, 2)
    optimizer = adamw(parameter_groups([("network", network)]), OptimizerConfig())
    assert all(group["fused"] for group in optimizer.param_groups)
