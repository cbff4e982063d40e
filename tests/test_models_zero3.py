"""The networks under DeepSpeed ZeRO-3 on two ranks against a plain single-process loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.clip import MaskSet
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.predictor import Predictor, PredictorConfig

ENCODER = EncoderConfig(width=48, heads=2, depth=3, patch_size=8)
PREDICTOR = PredictorConfig(width=24, heads=2, depth=2, num_mask_tokens=2)
GRID = ENCODER.grid(4, 32)
STEPS = 3
# gradient_clipping must be named: DeepSpeed clips to 1.0 when nothing is said.
ZERO = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
}


class Pair(torch.nn.Module):
    """Encoder and predictor with a scalar to minimise."""

    def __init__(self, recompute):
        super().__init__()
        options = {"attention": AttentionConfig(), "checkpoint_activations": recompute}
        self.encoder = Encoder(ENCODER, **options)
        self.predictor = Predictor(PREDICTOR, encoder_width=48, **options)

    def forward(self, clips, masks):
        losses = []
        for mask in masks:
            predicted = self.predictor(self.encoder(clips, mask.context_BK), mask, GRID)
            losses.append((predicted - 1).square().mean())
        return sum(losses) / len(losses)


def batch(step, clips=slice(None)):
    """Four clips with two masks whose lengths change from step to step."""
    generator = torch.Generator().manual_seed(step)
    masks = []
    for num_context in (8 + step, 5):
        order = torch.stack([torch.randperm(32, generator=generator) for _ in range(4)])
        context, target = order[:, :num_context].sort(1).values, order[:, 15:].sort(1).values
        masks.append(MaskSet(context_BK=context[clips], target_BK=target[clips]))
    return torch.randn(4, 3, 4, 32, 32, generator=generator)[clips], masks


def optimizer_of(module):
    # The large epsilon keeps Adam from blowing up rounding in gradients that are zero in theory.
    return torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-4)


def train_plainly():
    torch.manual_seed(0)
    pair = Pair(recompute=False)
    start = {name: value.detach().clone() for name, value in pair.named_parameters()}
    optimizer = optimizer_of(pair)
    for step in range(STEPS):
        optimizer.zero_grad()
        pair(*batch(step)).backward()
        optimizer.step()
    return start, dict(pair.named_parameters())


def train_sharded(folder):
    """What one rank does: the same loop, its half of the clips, all activations recomputed."""
    import deepspeed  # noqa: PLC0415 - six seconds that only the ranks spend
    from deepspeed.utils import safe_get_full_fp32_param  # noqa: PLC0415

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=ZERO):
        pair = Pair(recompute=True)
    engine, *_ = deepspeed.initialize(model=pair, optimizer=optimizer_of(pair), config=ZERO)

    def gathered():
        return {n: safe_get_full_fp32_param(p).clone() for n, p in pair.named_parameters()}

    start = gathered()
    for step in range(STEPS):
        engine.backward(engine(*batch(step, slice(2 * rank, 2 * rank + 2))))
        engine.step()
    end = gathered()
    if rank == 0:
        torch.save((start, end), folder / "weights.pt")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="the extra `train` is not installed")
    folder = tmp_path_factory.mktemp("zero3")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [__file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "weights.pt")


@pytest.fixture(scope="module")
def plain():
    return train_plainly()


def test_sharding_at_construction_keeps_the_initial_weights(sharded, plain):
    assert sharded[0].keys() == plain[0].keys()
    assert all(torch.equal(sharded[0][name], plain[0][name]) for name in plain[0])


def test_recomputing_blocks_under_zero3_trains_like_a_plain_loop(sharded, plain):
    for name, value in plain[1].items():
        torch.testing.assert_close(sharded[1][name], value.data, atol=1e-6, rtol=1e-5)
    moved = (
        plain[1]["encoder.blocks.0.attn.qkv.weight"] - plain[0]["encoder.blocks.0.attn.qkv.weight"]
    )
    assert moved.abs().max() > 1e-4


if __name__ == "__main__":
    train_sharded(Path(sys.argv[1]))
