"""Every attention kernel that runs here, on the calls of every stage."""

from typing import Any

import torch

from pipeline.models.attention_choice import AttentionChoice, choose_attention
from pipeline.plan.attention import attention_shapes
from pipeline.run import RunConfig


def measure_attention(
    config: RunConfig, stage_index: int, device: torch.device, rounds: int
) -> tuple[AttentionChoice, ...]:
    """Times the kernels, forward and backward, on a stage's calls."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    shapes = attention_shapes(config, stage_index)
    return choose_attention(tuple(shapes.values()), device, dtype, rounds=rounds)


def attention_figures(choices: tuple[AttentionChoice, ...]) -> dict[str, Any]:
    """Milliseconds of every kernel, or why it has none, by the call's name."""
    return {
        choice.shape.name: {
            "sequences": len(choice.shape.lengths),
            "tokens": sum(choice.shape.lengths),
            "longest": max(choice.shape.lengths),
            "heads": choice.shape.heads,
            "head_dim": choice.shape.head_dim,
            "fastest": choice.kernel,
            "kernels": {
                one.kernel: one.reason if one.milliseconds is None else round(one.milliseconds, 3)
                for one in choice.timings
            },
        }
        for choice in choices
    }
