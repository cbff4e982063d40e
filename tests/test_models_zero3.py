"""The networks under DeepSpeed ZeRO-3 on two ranks against a plain single-process loop."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.clip import MaskSet
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.packing import target_tokens
from pipeline.models.predictor import Predictor, PredictorConfig

# Every block is compiled anew: one that is recomputed, one that is not, and one that predicts.
ENCODER = EncoderConfig(width=48, heads=2, depth=2, patch_size=8)
PREDICTOR = PredictorConfig(width=24, heads=2, depth=1, num_mask_tokens=2)
GRID = ENCODER.grid(4, 32)
STEPS = 3
# gradient_clipping must be named: DeepSpeed clips to 1.0 when nothing is said.
ZERO = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
}


# ZeRO's stage, and whether blocks are compiled and masks packed, or recomputed and one by one.
# Stages 1 and 2 differ in gradients alone, which no block sees.
VARIANTS = {
    "recomputed": (3, False),
    "compiled-3": (3, True),
    "compiled-2": (2, True),
    "compiled-0": (0, True),
}


class Pair(torch.nn.Module):
    """Encoder and predictor with a scalar to minimise; `packed` runs both masks in one pass."""

    def __init__(self, recompute, *, packed=False):
        super().__init__()
        options = {"attention": AttentionConfig(), "checkpoint_activations": recompute}
        self.encoder = Encoder(ENCODER, **options)
        self.predictor = Predictor(PREDICTOR, encoder_width=48, **options)
        self.packed = packed

    def forward(self, clips, masks):
        if self.packed:
            predicted = self.predictor(self.encoder(clips, masks), masks, GRID)
            parts = predicted.split(target_tokens(masks).per_mask)
            return sum((part - 1).square().mean() for part in parts) / len(parts)
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
    saved = {}
    for name, (stage, compiled) in VARIANTS.items():
        settings = {**ZERO, "zero_optimization": {**ZERO["zero_optimization"], "stage": stage}}
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
            pair = Pair(recompute=not compiled, packed=compiled)
        if compiled:
            pair.encoder.num_recomputed_blocks = 1
            for network in (pair.encoder, pair.predictor):
                network.compile_blocks(dynamic=True, backend="aot_eager")
        engine, *_ = deepspeed.initialize(model=pair, optimizer=optimizer_of(pair), config=settings)

        def gathered(pair=pair, stage=stage):
            full: Any = safe_get_full_fp32_param if stage else torch.Tensor.detach
            return {n: full(p).clone() for n, p in pair.named_parameters()}

        start = gathered()
        for step in range(STEPS):
            engine.backward(engine(*batch(step, slice(2 * rank, 2 * rank + 2))))
            engine.step()
        saved[name] = (start, gathered())
        engine.destroy()
    if rank == 0:
        torch.save(saved, folder / "weights.pt")


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharding_at_construction_keeps_the_initial_weights(sharded, plain, variant):
    start = sharded[variant][0]
    assert start.keys() == plain[0].keys()
    assert all(torch.equal(start[name], plain[0][name]) for name in plain[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_and_compiled_blocks_train_like_a_plain_loop(sharded, plain, variant):
    """At every ZeRO stage, whose hooks gather and free the weights of compiled blocks too."""
    for name, value in plain[1].items():
        torch.testing.assert_close(sharded[variant][1][name], value.data, atol=1e-6, rtol=1e-5)
    moved = (
        plain[1]["encoder.blocks.0.attn.qkv.weight"] - plain[0]["encoder.blocks.0.attn.qkv.weight"]
    )
    assert moved.abs().max() > 1e-4


if __name__ == "__main__":
    train_sharded(Path(sys.argv[1]))
