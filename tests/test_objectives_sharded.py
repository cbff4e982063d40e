"""The furthest switches together, sharded over ranks, compute what a plain loop computes."""

import pytest
import torch

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import iterate_weights
from tests.plain import plain_run, tiny_config
from tests.ranks import run_on_ranks

NUM_STEPS = 4
BLOCKS = [
    {"num_blocks": 2, "spatial_scale": [0.3, 0.3]},
    {"num_blocks": 1, "spatial_scale": [0.6, 0.6]},
]
CHANGES = {
    "masks": {"truncate": "none", "blocks": BLOCKS},
    "attention": {"rope": "interleaved", "rope_rescale": True},
    "objective": {
        "kind": "jepa",
        "encoder": {
            "size": "vit_tiny", "width": 48, "depth": 2, "heads": 2, "patch_size": 8,
            "levels": [0, 1],
        },
        "predictor": {"width": 24, "depth": 1, "heads": 2, "predict_context": True},
        "momentum": {"start": 0.9, "end": 0.95},
        "context_loss": {"weight": 0.5, "start_step": 1, "full_step": 3},
    },
}  # fmt: skip


def test_zero3_on_two_ranks_trains_v_jepa_21_on_ragged_masks_like_a_plain_loop(tmp_path):
    torch.set_num_threads(1)
    arguments = {"zero_stage": 3, "num_steps": NUM_STEPS, "changes": CHANGES}
    ranks = run_on_ranks("tests.workers.zero_run", 2, tmp_path, arguments)
    plain = plain_run(tiny_config(**CHANGES), NUM_STEPS)
    assert ranks[0]["losses"] == pytest.approx(plain.losses, abs=5e-6)
    weights = dict(iterate_weights(layout.list_commits(tmp_path)[0].path))
    assert weights.keys() == plain.weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain.weights[name], atol=5e-6, rtol=0.0, msg=name)
