"""Heads: sizes and arithmetic of the published probe, and what fitting them must find."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.models.attentive import AttentivePooler, AttentiveProbe
from pipeline.probe.features import CachedInputs
from pipeline.probe.fit import FitPlan, Judge, fit_sweep
from pipeline.probe.heads import LinearProbe, knn_scores
from pipeline.probe.scoring import HeadInputs, score_knn, score_sweep, split_heldout
from pipeline.probe.tasks import KnnConfig, SweepConfig
from tests.probe_data import ssv2_task

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("width", "parameters"), [(1024, 49_514_670), (1280, 77_294_254), (1408, 93_494_190)]
)
def test_attentive_probe_has_the_published_number_of_parameters(width, parameters):
    """49.5 M, 77.3 M and 93.5 M for the 174 classes of SSv2."""
    with torch.device("meta"):
        probe = AttentiveProbe(width=width, num_classes=174)
    assert sum(p.numel() for p in probe.parameters()) == parameters


def test_cross_attention_equals_its_formula_without_projection_or_query_norm():
    torch.manual_seed(0)
    pooler = AttentivePooler(width=8, num_heads=2, num_blocks=1).double()
    tokens_BND = torch.randn(3, 5, 8, dtype=torch.float64)
    block = pooler.cross_attention_block
    query_D = pooler.query_tokens[0, 0]
    normed = functional.layer_norm(tokens_BND, (8,), block.norm1.weight, block.norm1.bias, eps=1e-5)
    key, value = block.xattn.kv(normed).chunk(2, dim=-1)
    query = block.xattn.q(query_D)
    parts = []
    for half in (slice(0, 4), slice(4, 8)):
        weights = (key[..., half] @ query[half] / math.sqrt(4)).softmax(dim=-1)
        parts.append((weights[..., None] * value[..., half]).sum(dim=1))
    attended = query_D + torch.cat(parts, dim=-1)
    expected = attended + block.mlp.fc2(functional.gelu(block.mlp.fc1(block.norm2(attended))))
    torch.testing.assert_close(pooler(tokens_BND), expected)


def test_attentive_probe_sees_no_order_of_tokens():
    probe = AttentiveProbe(width=16, num_classes=3, num_heads=4, num_blocks=3).double()
    tokens_BND = torch.randn(2, 7, 16, dtype=torch.float64)
    shuffled = tokens_BND[:, torch.randperm(7)]
    torch.testing.assert_close(probe(tokens_BND), probe(shuffled))


def test_all_norms_of_the_probe_use_the_published_epsilon():
    probe = AttentiveProbe(width=16, num_classes=3, num_heads=4)
    norms = [module for module in probe.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 8
    assert {norm.eps for norm in norms} == {1e-5}


def test_residual_ends_shrink_with_depth_and_the_cross_block_like_the_last_before_it():
    torch.manual_seed(0)
    pooler = AttentiveProbe(width=256, num_classes=3).pooler
    ends = [block.mlp.fc2.weight for block in pooler.blocks]
    ends += [pooler.cross_attention_block.mlp.fc2.weight]
    for layer, weight in zip((1, 2, 3, 3), ends, strict=True):
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.02)


def test_knn_equals_a_brute_force_vote():
    torch.manual_seed(0)
    train_NF, query_QF = torch.randn(60, 6) + 3, torch.randn(9, 6) + 3
    labels_N = torch.randint(0, 4, (60,))
    found = knn_scores(train_NF, labels_N, query_QF, num_classes=4, k=7, temperature=0.1)
    centre = train_NF.mean(dim=0)
    for row, query in enumerate(query_QF - centre):
        cosines = [
            (float(functional.cosine_similarity(query, one, dim=0)), int(label))
            for one, label in zip(train_NF - centre, labels_N, strict=True)
        ]
        nearest = sorted(cosines, reverse=True)[:7]
        total = sum(math.exp(cosine / 0.1) for cosine, _ in nearest)
        for label in range(4):
            share = sum(math.exp(c / 0.1) for c, voted in nearest if voted == label) / total
            assert found[row, label].item() == pytest.approx(share, abs=1e-5)


def test_linear_probe_ignores_scale_and_offset_of_features_and_those_that_never_vary():
    features = torch.randn(50, 3) * torch.tensor([1e-3, 1.0, 1e3]) + 7
    features = torch.cat([features, torch.full((50, 1), 5.0)], dim=1)
    probe = LinearProbe(mean=features.mean(0), std=features.std(0), num_classes=2)
    seen = (features - probe.mean) * probe.scale
    torch.testing.assert_close(seen[:, :3].std(0), torch.ones(3))
    assert seen[:, 3].abs().max() < 1e-6


def test_separable_features_score_full_marks_with_every_head():
    inputs = _clusters(separation=4.0)
    for score in _all_heads(inputs):
        assert score.chosen.validation.accuracy.top1 == 1.0


def test_labels_without_relation_to_features_score_about_chance_with_every_head():
    inputs = _clusters(separation=4.0, num_val=400)
    # Clip n lies in cluster n % 4; these labels are spread evenly over each cluster's clips.
    unrelated = [
        CachedInputs(part.inputs_NV, torch.arange(len(part.labels_N)) // 4 % 4)
        for part in (inputs.train, inputs.validation)
    ]
    wrong = HeadInputs(train=unrelated[0], validation=unrelated[1], device=CPU, autocast=None)
    for score in _all_heads(wrong):
        assert score.chosen.validation.accuracy.top1 == pytest.approx(0.25, abs=0.1)


def test_heads_of_a_sweep_learn_as_they_would_alone():
    inputs = _clusters(separation=1.0)
    both = _fit(inputs, learning_rates=(1e-2, 1e-3))
    alone = _fit(inputs, learning_rates=(1e-3,))
    assert both[1].curve == alone[0].curve
    assert both[0].curve != alone[0].curve


def test_clips_computed_a_few_at_once_give_the_heads_that_whole_batches_give():
    inputs = _clusters(separation=1.0)
    whole, parts = (_fit(inputs, learning_rates=(1e-2,), at_once=n)[0] for n in (None, 3))
    for one, other in zip(whole.head.parameters(), parts.head.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    for one, other in zip(whole.curve, parts.curve, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.validation.top1 == pytest.approx(one.validation.top1, abs=0.02)
        assert other.validation.num_clips == 60


def test_heldout_clips_hold_every_class_in_proportion_and_no_clip_twice():
    labels_N = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)[torch.randperm(70)]
    order, held = split_heldout(labels_N, 0.2, seed=3)
    assert sorted([*order.tolist(), *held.tolist()]) == list(range(70))
    assert labels_N[held].bincount().tolist() == [8, 4, 2]
    assert not torch.equal(held, split_heldout(labels_N, 0.2, seed=4)[1])


def test_choosing_on_heldout_clips_sees_validation_once_and_on_validation_takes_its_best(tmp_path):
    inputs = _clusters(separation=0.5)
    sweep = SweepConfig(learning_rates=(1e-2, 1e-4), epochs=5, batch=16)
    build = _linear(inputs)
    scores = {
        rule: score_sweep(
            build, inputs, ssv2_task(tmp_path, selection=rule), sweep=sweep, seed=0, report=_silent
        )
        for rule in ("heldout", "validation")
    }
    assert [rule.name for rule in scores["heldout"].by_rule] == ["held-out", "best-on-validation"]
    best = scores["validation"]
    top1 = best.chosen.validation.accuracy.top1
    assert top1 == max(point["validation_top1"] for point in best.curve)
    assert best.chosen.choice["epoch"] == 1 + [p["validation_top1"] for p in best.curve].index(top1)
    # One fit answers both questions: the rules differ in the order in which they are told.
    told = {
        name: {rule.name: rule.validation.accuracy for rule in score.by_rule}
        for name, score in scores.items()
    }
    assert told["heldout"] == told["validation"]


def _clusters(*, separation: float, num_val: int = 60):
    """Four Gaussian classes in 12 dimensions, one view to train and two to validate."""
    generator = torch.Generator().manual_seed(0)
    centres = functional.normalize(torch.randn(4, 12, generator=generator), dim=1)
    sets = []
    for num, views in ((160, 1), (num_val, 2)):
        labels_N = torch.arange(num) % 4
        noise = 0.3 * torch.randn(num, views, 12, generator=generator)
        features = separation * centres[labels_N][:, None] + noise
        sets.append(CachedInputs(features.numpy(), labels_N))
    return HeadInputs(train=sets[0], validation=sets[1], device=CPU, autocast=None)


def _all_heads(inputs):
    task = ssv2_task(None)
    train_NF = torch.from_numpy(inputs.train.inputs_NV[:, 0])
    sweep = SweepConfig(learning_rates=(3e-3, 1e-2), epochs=15, batch=32)
    yield score_sweep(_linear(inputs), inputs, task, sweep=sweep, seed=0, report=_silent)
    yield score_knn(train_NF, inputs, KnnConfig(), num_classes=4)
    as_tokens = HeadInputs(
        train=CachedInputs(inputs.train.inputs_NV[:, :, None], inputs.train.labels_N),
        validation=CachedInputs(
            inputs.validation.inputs_NV[:, :, None], inputs.validation.labels_N
        ),
        device=CPU,
        autocast=None,
    )
    build = partial(AttentiveProbe, width=12, num_classes=4, num_heads=2, num_blocks=2)
    yield score_sweep(build, as_tokens, task, sweep=sweep, seed=0, report=_silent)


def _linear(inputs):
    train_NF = torch.from_numpy(inputs.train.inputs_NV[:, 0])
    return partial(LinearProbe, mean=train_NF.mean(0), std=train_NF.std(0), num_classes=4)


def _fit(inputs, *, learning_rates, at_once=None):
    plan = FitPlan(
        train=inputs.train,
        order=torch.arange(160),
        heldout=None,
        validation=Judge(inputs=inputs.validation, order=torch.arange(60)),
        sweep=SweepConfig(learning_rates=learning_rates, epochs=3, batch=16, clips_at_once=at_once),
        seed=0,
        device=CPU,
        autocast=None,
    )
    return fit_sweep(_linear(inputs), plan, _silent)


def _silent(done: int, total: int) -> None:
    pass
