"""Networks and clips that steps are compared on."""

import json
from typing import Any

import torch

from pipeline.run import RunConfig

_CPU = {
    # On two cores a step of these takes seconds.
    "vit_tiny": {
        "encoder": {"size": "vit_tiny"},
        "predictor": {"width": 192, "depth": 6, "heads": 6},
        "frames": 16,
        "resolution": 128,
        "micro_batch": 4,
    },
    "vit_base": {
        "encoder": {"size": "vit_base", "depth": 4},
        "predictor": {"width": 384, "depth": 4, "heads": 12},
        "frames": 16,
        "resolution": 128,
        "micro_batch": 2,
    },
}
_SMALL_CLIP = {"frames": 16, "resolution": 256}
_LARGE_CLIP = {"frames": 64, "resolution": 384}
_GPU = {
    f"{size}-{clip['frames']}x{clip['resolution']}": {
        "encoder": {"size": size},
        "predictor": {},
        **clip,
        "micro_batch": micro_batch,
    }
    for size, small, large in (
        ("vit_large", 24, 4),
        ("vit_huge", 24, 2),
        ("vit_giant_xformers", 24, 2),
    )
    for clip, micro_batch in ((_SMALL_CLIP, small), (_LARGE_CLIP, large))
}


def shapes(device: torch.device) -> dict[str, dict[str, Any]]:
    """Shapes by name: small ones for a CPU, those that V-JEPA 2 was trained with for a GPU."""
    return _GPU if device.type == "cuda" else _CPU


def shape_config(name: str, device: torch.device, **changes: Any) -> RunConfig:
    """The run of a shape: one stage, released masks, bf16 on a GPU and fp32 on a CPU."""
    shape = shapes(device)[name]
    stage = {key: shape[key] for key in ("frames", "resolution", "micro_batch")}
    rate = {"shape": "constant", "peak": 1e-4}
    settings = {
        "name": name,
        "global_batch": shape["micro_batch"],
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "stages": [{**stage, "name": name, "steps": 1000, "fps": 4.0, "learning_rate": rate}],
        # The reference's rule, so that the sides are compared on what it trains on.
        "masks": {"truncate": "min"},
        "objective": {
            "kind": "jepa",
            "encoder": shape["encoder"],
            "predictor": shape["predictor"],
            "momentum": {"start": 0.99, "end": 0.99},
        },
        "activation_checkpointing": "auto",
        "data": {"sources": [{"path": "none-is-read"}]},
        **changes,
    }
    return RunConfig.model_validate_json(json.dumps(settings))
