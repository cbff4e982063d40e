"""How many blocks are recomputed, and what counts as FLOPs of a micro-batch."""

from dataclasses import replace

import pytest
import torch

from pipeline.bench.batches import noise_batches
from pipeline.plan.account import batch_flops, batch_recomputed_flops
from pipeline.plan.memory import activation_bytes, reserved_bytes
from pipeline.plan.recompute import Recomputed, Stack, choose_recomputed, recomputed_for
from pipeline.plan.work import sample_kept_tokens, summarise
from pipeline.track.peaks import find_peak, measured_tflops, stated_peak, utilisation
from tests.plain import tiny_config

CPU = torch.device("cpu")
# 10 bytes a block for 40 FLOPs each, and 5 bytes a block for 10: the second frees more per FLOP.
WIDE = Stack(name="encoder", depth=3, saved_bytes=10.0, flops=40.0, working_bytes=2.0)
NARROW = Stack(name="predictor", depth=2, saved_bytes=5.0, flops=10.0, working_bytes=1.0)


@pytest.mark.parametrize(
    ("free", "chosen"),
    [
        (100.0, (0, 0)),
        (99.0, (0, 1)),
        (92.0, (0, 2)),
        (91.0, (1, 2)),
        (62.0, (3, 2)),
        (0.0, (3, 2)),
    ],
)
def test_the_fewest_flops_are_recomputed_that_make_a_stage_fit(free, chosen):
    found = choose_recomputed((WIDE, NARROW), 100.0, free)
    assert (found["encoder"], found["predictor"]) == chosen


def test_less_memory_never_recomputes_less():
    previous = 0
    for free in range(100, -1, -1):
        found = choose_recomputed((WIDE, NARROW), 100.0, float(free))
        assert sum(found.values()) >= previous
        previous = sum(found.values())


def test_auto_recomputes_what_memory_asks_for_and_a_stage_overrides_the_run():
    config = tiny_config(activation_checkpointing="auto")
    stage, masks = config.stages[1], summarise(sample_kept_tokens(config, 1))
    needed = activation_bytes(config, stage, masks, checkpointing=False)
    enough = (needed + reserved_bytes(config, 1)) / 0.9
    assert recomputed_for(config, stage, masks, enough, 1) == Recomputed()
    tight = recomputed_for(config, stage, masks, enough - 0.05 * needed / 0.9, 1)
    assert 0 < tight.encoder + tight.predictor <= 3
    every = Recomputed(encoder=2, predictor=1)
    assert recomputed_for(config, stage, masks, 0.0, 1) == every
    off = stage.model_copy(update={"activation_checkpointing": False})
    assert recomputed_for(config, off, masks, 0.0, 1) == Recomputed()
    on = stage.model_copy(update={"activation_checkpointing": True})
    assert recomputed_for(config, on, masks, 1e15, 1) == every


@pytest.mark.parametrize("truncate", ["min", "fixed", "none"])
def test_flops_of_a_batch_are_those_of_its_clips(truncate):
    config = tiny_config()
    masks = config.masks.model_copy(update={"truncate": truncate})
    config = config.model_copy(update={"masks": masks})
    batch = noise_batches(config, 0, CPU, 1)[0]
    by_clip = [
        config.objective.training_flops(batch.grid, [mask.kept()[clip] for mask in batch.masks])
        for clip in range(len(batch.keys))
    ]
    assert batch_flops(config.objective, batch) == pytest.approx(sum(by_clip))


def test_recomputing_every_block_costs_the_blocks_forward_pass_again():
    config = tiny_config()
    batch = noise_batches(config, 0, CPU, 1)[0]
    every = batch_recomputed_flops(config, batch, Recomputed(encoder=2, predictor=1))
    half = batch_recomputed_flops(config, batch, Recomputed(encoder=1))
    assert batch_recomputed_flops(config, batch, Recomputed()) == 0.0
    encoder, predictor = config.objective.encoder.dims, config.objective.predictor.dims
    expected = 0.0
    for context, target in [mask.kept()[0] for mask in batch.masks]:
        for dims, tokens in ((encoder, context), (predictor, context + target)):
            products = 4 * dims.width**2 + 2 * dims.width * dims.mlp_hidden
            expected += dims.depth * tokens * (2 * products + 4 * tokens * dims.width)
    assert every == pytest.approx(expected * len(batch.keys))
    assert 0 < half < every


def test_a_peak_is_stated_with_its_source_or_not_at_all():
    assert stated_peak("NVIDIA H100 80GB HBM3").tflops == 989.5
    assert stated_peak("NVIDIA H100 PCIe").tflops == 756.5
    assert stated_peak("NVIDIA A100-SXM4-80GB").tflops == 312.0
    assert stated_peak("NVIDIA L40").tflops != stated_peak("NVIDIA L4").tflops
    assert stated_peak("Some Other Device") is None
    assert find_peak(None, CPU, torch.float32) is None
    assert find_peak(3.5, CPU, torch.float32).tflops == 3.5
    assert utilisation(4e12, 2.0, find_peak(2.0, CPU, torch.float32), 4) == pytest.approx(0.25)


def test_the_measured_peak_is_that_of_a_matrix_product():
    tflops = measured_tflops(CPU, torch.float32, edge=256, rounds=3)
    assert 1e-4 < tflops < 100.0
    peak = find_peak(2.0, CPU, torch.float32)
    used = utilisation(1.0, 1.0, replace(peak, tflops=tflops), 1)
    assert used == pytest.approx(1e-12 / tflops)
