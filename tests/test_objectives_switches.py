"""Every switch of the objective is the formula that it stands for."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pipeline.clip import ClipBatch, Grid, Losses, Progress
from pipeline.config.load import load_config
from pipeline.data.augment import normalise
from pipeline.errors import ConfigError
from pipeline.masks.blocks import MaskConfig
from pipeline.masks.sample import sample_masks
from pipeline.models.packing import context_tokens, target_tokens
from pipeline.objectives import build_objective
from pipeline.objectives._dense import ContextLoss, squared_distances
from pipeline.objectives.base import BuildOptions, Objective
from pipeline.run import RunConfig
from pipeline.schedule import Ramp, cosine, learning_rate, linear
from tests.plain import noise_batch, plans

torch.set_num_threads(1)

CONFIGS = Path("pipeline/configs")
SMALL = (
    "objective.encoder.depth=2",
    "objective.predictor.depth=1",
    "objective.encoder.size=vit_tiny",
)


def test_one_pass_over_all_masks_equals_one_pass_for_each_mask():
    objective, batch = _build("tiny-cpu")
    losses = _loss(objective, batch)
    for number, mask in enumerate(batch.masks):
        alone = _loss(objective, dataclasses.replace(batch, masks=(mask,)))
        torch.testing.assert_close(
            losses.terms[f"loss_mask_{number}"], alone.total, rtol=1e-6, atol=0
        )


def test_l1_of_normalised_teacher_features_at_the_targets_is_the_loss():
    objective, batch = _build("tiny-cpu")
    modules, video = objective.modules(), normalise(batch.video_BCTHW)
    for number, mask in enumerate(batch.masks):
        wanted = functional.layer_norm(modules["teacher"](video), (192,), eps=1e-5)
        wanted = wanted.gather(1, mask.target_BK[..., None].expand(-1, -1, 192))
        context = modules["encoder"](video, mask.context_BK)
        guess = modules["predictor"](context, mask, batch.grid)
        found = _loss(objective, batch).terms[f"loss_mask_{number}"]
        torch.testing.assert_close(found, (guess - wanted).abs().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("words", [("tiny-cpu",), ("vjepa21-tiny-cpu",)])
def test_without_truncation_a_batch_has_the_mean_loss_and_gradient_of_its_clips(words):
    objective, batch = _build(*words, "masks.truncate=none", *SMALL[1:])
    assert batch.masks[0].context_lengths is not None
    together = _loss(objective, batch)
    together.total.backward()
    whole = {n: p.grad.clone() for n, p in _trained(objective)}
    objective.modules().zero_grad()
    alone = [_loss(objective, clip) for clip in _single_clips(batch)]
    total = torch.stack([one.total for one in alone]).mean()
    total.backward()
    torch.testing.assert_close(together.total, total, rtol=1e-6, atol=0)
    for name, parameter in _trained(objective):
        difference = (parameter.grad - whole[name]).norm() / whole[name].norm().clamp_min(1e-9)
        assert difference < 1e-5, name


def test_smooth_l1_is_half_the_square_below_one_and_a_line_above():
    objective, batch = _build("tiny-cpu", "objective.distance=smooth-l1")
    mask = batch.masks[0]
    modules, video = objective.modules(), normalise(batch.video_BCTHW)
    wanted = functional.layer_norm(modules["teacher"](video), (192,))
    wanted = wanted.gather(1, mask.target_BK[..., None].expand(-1, -1, 192))
    guess = modules["predictor"](modules["encoder"](video, mask.context_BK), mask, batch.grid)
    error = (guess - wanted).abs()
    assert error.min() < 1.0 < error.max()
    expected = torch.where(error < 1.0, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(
        _loss(objective, batch).terms["loss_mask_0"], expected, rtol=1e-6, atol=0
    )


def test_the_context_losses_weight_is_zero_then_rises_on_a_line():
    loss = ContextLoss(weight=0.5, start_step=15_000, full_step=30_000)
    weights = [loss.at(step) for step in (1, 15_000, 18_000, 22_500, 30_000, 200_000)]
    assert weights == pytest.approx([0.0, 0.0, 0.1, 0.25, 0.5, 0.5])
    assert ContextLoss(start_step=0, full_step=0).at(1) == 0.5


@pytest.mark.parametrize("rule", ["min", "none"])
def test_distances_to_the_nearest_target_equal_those_of_all_pairs(rule):
    grid = Grid(t=3, h=7, w=5)
    masks = sample_masks(MaskConfig(truncate=rule), grid, 1, range(3))
    found = squared_distances(target_tokens(masks), grid)
    places = torch.stack(
        torch.meshgrid(*(torch.arange(n) for n in (grid.t, grid.h, grid.w)), indexing="ij"), -1
    ).view(-1, 3)
    rows = [(m.target_BK[b, : m.kept()[b][1]]) for m in masks for b in range(3)]
    for row, targets in zip(found, rows, strict=True):
        pairs = (places[:, None] - places[targets]).square().sum(-1)
        assert torch.equal(row.long(), pairs.min(1).values)


def test_v_jepa_21_adds_the_context_distance_by_its_weight_and_teaches_normalised_levels():
    objective, batch = _build("vjepa21-tiny-cpu")
    modules, video = objective.modules(), normalise(batch.video_BCTHW)
    levels = modules["teacher"](video, layers=(0, 1, 2, 3))
    wanted = torch.cat([functional.layer_norm(level, (192,)) for level in levels], dim=-1)
    together = modules["encoder"](video, batch.masks, levels=True)
    _, again = modules["predictor"](together, batch.masks, batch.grid)
    context, start, means = context_tokens(batch.masks), 0, []
    for mask in batch.masks:
        rows = again[start : start + mask.context_BK.numel()].unflatten(0, mask.context_BK.shape)
        start += mask.context_BK.numel()
        error = (rows - wanted.gather(1, mask.context_BK[..., None].expand_as(rows))).abs().mean(-1)
        means.append((error / _distance(mask, batch.grid).sqrt()).mean())
    assert start == sum(context.per_mask)
    losses = _loss(objective, batch, step=15)
    torch.testing.assert_close(losses.terms["loss_context"], sum(means) / 2, rtol=1e-5, atol=0)
    predicted = (losses.terms["loss_mask_0"] + losses.terms["loss_mask_1"]) / 2
    expected = predicted + 0.25 * losses.terms["loss_context"]
    torch.testing.assert_close(losses.total, expected)
    assert losses.features_ND.shape[1] == 192


@pytest.mark.parametrize("name", ["vjepa1-tiny-cpu", "vjepa21-tiny-cpu"])
def test_every_trained_weight_of_the_family_gets_a_gradient(name):
    objective, batch = _build(name)
    _loss(objective, batch, step=30).total.backward()
    for weight, parameter in _trained(objective):
        assert parameter.grad is not None, weight
        assert parameter.grad.isfinite().all(), weight
        if weight != "predictor.mask_tokens":
            assert parameter.grad.any(), weight


def test_v_jepa_1_asks_for_each_mask_with_a_token_of_its_own():
    objective, batch = _build("vjepa1-tiny-cpu")
    before = _loss(objective, batch).terms
    with torch.no_grad():
        objective.modules()["predictor"].mask_tokens[1].normal_()
    after = _loss(objective, batch).terms
    assert torch.equal(before["loss_mask_0"], after["loss_mask_0"])
    assert not torch.equal(before["loss_mask_1"], after["loss_mask_1"])


def test_v_jepa_1_starts_all_blocks_alike_and_v_jepa_2_deeper_ones_smaller():
    for name, expected in (("vjepa1-tiny-cpu", 1.0), ("tiny-cpu", 2.0)):
        blocks = _build(name)[0].modules()["encoder"].blocks
        for leaf in ("attn.proj", "mlp.fc2"):
            first, last = (blocks[n].get_submodule(leaf).weight.std() for n in (0, 3))
            # 1/sqrt(2) against 1/sqrt(8); 37,000 weights and more give half a per cent.
            assert (first / last).item() == pytest.approx(expected, rel=0.02)


def test_schedules_of_v_jepa_1_end_where_the_reference_ends():
    config = load_config(CONFIGS / "vjepa1-vitl16.yaml", RunConfig, ()).config
    # Published ends of the released run: schedules stretched to 1.25 times its 90,000 steps.
    assert config.weight_decay(90_000) == pytest.approx(0.366, abs=5e-4)
    assert config.learning_rate(90_000) == pytest.approx(7.5e-5, rel=0.02)
    assert linear(config.objective.momentum, 90_000, 90_000) == pytest.approx(0.9996, abs=1e-6)
    angle = math.pi * 45_000 / 112_500
    expected = 0.4 - 0.18 * (1 + math.cos(angle))
    assert cosine(Ramp(start=0.04, end=0.4, stretch=1.25), 45_000, 90_000) == pytest.approx(
        expected
    )
    stage = config.stages[0]
    assert learning_rate(stage.learning_rate, 12_000, 90_000) == pytest.approx(6.25e-4)


def test_a_context_loss_needs_a_predictor_that_predicts_the_context():
    with pytest.raises(ConfigError, match="predict_context and context_loss belong together"):
        _build("vjepa21-tiny-cpu", "objective.predictor.predict_context=false")


def _build(name: str, *words: str) -> tuple[Objective, ClipBatch]:
    config = load_config(CONFIGS / f"{name}.yaml", RunConfig, words).config
    torch.manual_seed(0)
    options = BuildOptions(attention=config.attention, checkpoint_activations=False)
    objective = build_objective(config.objective, options)
    return objective, noise_batch(plans(config, 0, 1, 1)[0], 0)


def _loss(objective: Objective, batch: ClipBatch, step: int = 1) -> Losses:
    return objective.loss(batch, Progress(step=step, total_steps=60, stage=0))


def _trained(objective: Objective):
    return [(n, p) for n, p in objective.modules().named_parameters() if p.requires_grad]


def _single_clips(batch: ClipBatch) -> list[ClipBatch]:
    masks = MaskConfig(truncate="none")
    return [
        dataclasses.replace(
            batch,
            keys=batch.keys[n : n + 1],
            refs=batch.refs[n : n + 1],
            video_BCTHW=batch.video_BCTHW[n : n + 1],
            masks=sample_masks(masks, batch.grid, 0, [batch.refs[n].position]),
        )
        for n in range(len(batch.keys))
    ]


def _distance(mask, grid: Grid) -> torch.Tensor:
    def place(index):
        return torch.stack(
            [index // (grid.h * grid.w), index // grid.w % grid.h, index % grid.w], -1
        )

    return (
        torch.cdist(place(mask.context_BK).double(), place(mask.target_BK).double())
        .amin(-1)
        .float()
    )
