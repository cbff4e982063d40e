"""AdamW's settings and its parameter groups."""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from pipeline.config.section import Section
from pipeline.schedule import Ramp


class OptimizerConfig(Section):
    """AdamW; the learning rate belongs to the stages."""

    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the denominator of the update."""
    weight_decay: Ramp = Ramp(start=0.04, end=0.04)
    """Weight decay over the whole run, following a cosine from start to end."""
    clip_gradient_norm: float | None = Field(default=None, gt=0.0)
    """Largest norm of the whole gradient; longer ones are shortened to it. V-JEPA 2 uses none."""


def parameter_groups(modules: Iterable[tuple[str, nn.Module]]) -> list[dict[str, Any]]:
    """Two groups a module, with and without weight decay, as V-JEPA 2 was trained.

    No decay for biases and for one-dimensional parameters; mask tokens have four dimensions and
    are decayed. Frozen parameters are in no group.

    Args:
        modules: Names and modules, such as ("encoder", …), ("predictor", …).

    Returns:
        Groups with `name`, `params` and `decays`, empty ones left out.
    """
    groups = []
    for module_name, module in modules:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for decays in (True, False):
            params = [p for name, p in named if _decays(name, p) is decays]
            if params:
                suffix = "decay" if decays else "no_decay"
                groups.append(
                    {"name": f"{module_name}/{suffix}", "params": params, "decays": decays}
                )
    return groups


def adamw(groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over groups of `parameter_groups`, at a rate of 0 until a step sets it.

    Fused on GPUs and on CPUs: one pass over weight, gradient and moments instead of a dozen, which
    is most of the time of an update, since it is bound by memory. The results differ from the
    plain loop's by rounding only.
    """
    return torch.optim.AdamW(
        [{"params": g["params"], "name": g["name"], "weight_decay": 0.0} for g in groups],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # Under ZeRO-3 a parameter's own shape is that of an empty placeholder.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return "bias" not in name and len(shape) > 1
