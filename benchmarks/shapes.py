"""Networks and clips that steps are compared on."""

import json
from typing import Any

import torch

from pipeline.run import RunConfig

# encoder, predictor, frames, pixels, clips. On two cores a step of these takes seconds.
SHAPES: dict[str, dict[str, Any]] = {
    "vit_tiny": {
        "encoder": {"size": "vit_tiny"},
        "predictor": {"width": 192, "depth": 6, "heads": 6},
        "frames": 16,
        "resolution": 128,
        "micro_batch": 4,
    },
    "vit_base": {
        "encoder": {"size": "vit_base", "depth": 6},
        "predictor": {"width": 384, "depth": 6, "heads": 12},
        "frames": 8,
        "resolution": 128,
        "micro_batch": 2,
    },
}


def shape_config(name: str, *, zero_stage: int, device: torch.device) -> RunConfig:
    """The run of a shape: one stage, released masks, bf16 on a GPU and fp32 on a CPU."""
    shape = SHAPES[name]
    stage = {key: shape[key] for key in ("frames", "resolution", "micro_batch")}
    rate = {"shape": "constant", "peak": 1e-4}
    settings = {
        "name": name,
        "global_batch": shape["micro_batch"],
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "stages": [{**stage, "name": name, "steps": 1000, "fps": 4.0, "learning_rate": rate}],
        "objective": {
            "kind": "jepa",
            "encoder": shape["encoder"],
            "predictor": shape["predictor"],
            "momentum": {"start": 0.99, "end": 0.99},
        },
        "zero": {"stage": zero_stage},
        "data": {"sources": [{"path": "none-is-read"}]},
    }
    return RunConfig.model_validate_json(json.dumps(settings))
