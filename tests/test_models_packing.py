"""One pass over all masks of a micro-batch against a pass for each mask and clip."""

from dataclasses import replace

import pytest
import torch

from pipeline.clip import Grid, MaskSet
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.packing import (
    context_tokens,
    gather_packed,
    packing_of,
    target_tokens,
)
from pipeline.models.predictor import Predictor, PredictorConfig

torch.set_num_threads(1)
ENCODER = EncoderConfig(width=56, heads=2, depth=2, mlp_hidden=80, patch_size=4)
PREDICTOR = PredictorConfig(width=32, heads=2, depth=2, num_mask_tokens=2)
GRID = Grid(t=3, h=3, w=5)
CLIPS = 3
# Context and target tokens of each clip, for each mask.
RAGGED = (((11, 4, 7), (20, 9, 14)), ((3, 5, 5), (30, 31, 8)))


def draw_masks(lengths, generator):
    """Masks whose rows are padded with index 0 to the longest of their mask."""
    masks = []
    for contexts, targets in lengths:
        orders = [torch.randperm(GRID.num_tokens, generator=generator) for _ in contexts]
        rows = zip(orders, contexts, targets, strict=True)
        pairs = [(o[:c].sort().values, o[c : c + t].sort().values) for o, c, t in rows]
        context, target = (
            torch.nn.utils.rnn.pad_sequence([pair[i] for pair in pairs], batch_first=True)
            for i in (0, 1)
        )
        mask = MaskSet(context_BK=context, target_BK=target)
        masks.append(replace(mask, context_lengths=contexts, target_lengths=targets))
    return masks


def equal_masks():
    lengths = (((7,) * CLIPS, (20,) * CLIPS), ((4,) * CLIPS, (30,) * CLIPS))
    masks = draw_masks(lengths, torch.Generator().manual_seed(1))
    return [replace(mask, context_lengths=None, target_lengths=None) for mask in masks]


def ragged_masks():
    return draw_masks(RAGGED, torch.Generator().manual_seed(2))


def networks(attention=None, predictor=PREDICTOR):
    torch.manual_seed(0)
    attention = attention or AttentionConfig()
    pair = (
        Encoder(ENCODER, attention=attention),
        Predictor(predictor, encoder_width=ENCODER.dims.width, attention=attention),
    )
    with torch.no_grad():
        for parameter in (p for module in pair for p in module.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return pair


def video():
    return torch.randn(CLIPS, 3, 6, 12, 20, generator=torch.Generator().manual_seed(3))


def rows_of(index_BK, lengths):
    """Each clip's indices as [1, k], without padding."""
    lengths = lengths or (index_BK.shape[1],) * len(index_BK)
    return [row[None, :length] for row, length in zip(index_BK, lengths, strict=True)]


def separate_passes(encoder, predictor, masks, *, per_mask=False):
    """Predictions of all masks and clips, each from calls of its own, packed."""
    out = []
    for number, mask in enumerate(masks):
        contexts = rows_of(mask.context_BK, mask.context_lengths)
        targets = rows_of(mask.target_BK, mask.target_lengths)
        for clip, context, target in zip(video().split(1), contexts, targets, strict=True):
            single = MaskSet(context_BK=context, target_BK=target)
            token = number if per_mask else 0
            out.append(predictor(encoder(clip, context), single, GRID, mask_token=token)[0])
    return torch.cat(out)


def assert_same(one, other):
    """Equal up to rounding: the outputs here go up to 3."""
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 1e-6 * other.abs().max().clamp(min=1.0)


def gradients(modules, out):
    weights = torch.linspace(-0.5, 0.5, out.numel()).view(out.shape)
    parameters = [p for module in modules for p in module.parameters()]
    return torch.autograd.grad((out * weights).sum() / len(out), parameters)


@pytest.mark.parametrize("draw", [equal_masks, ragged_masks])
@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_one_pass_over_all_masks_equals_a_pass_for_each_clip_and_its_gradient(draw, positions):
    pair, masks = networks(AttentionConfig(positions=positions)), draw()
    encoder, predictor = pair
    packed = predictor(encoder(video(), masks), masks, GRID)
    separate = separate_passes(*pair, masks)
    assert_same(packed, separate)
    for one, other in zip(gradients(pair, packed), gradients(pair, separate), strict=True):
        assert_same(one, other)


def test_one_pass_equals_a_dense_pass_for_each_mask():
    (encoder, predictor), masks = networks(), equal_masks()
    packed = predictor(encoder(video(), masks), masks, GRID)
    dense = [predictor(encoder(video(), m.context_BK), m, GRID).flatten(0, 1) for m in masks]
    for one, other in zip(packed.split(target_tokens(masks).per_mask), dense, strict=True):
        assert_same(one, other)


def test_layers_of_a_packed_pass_are_those_of_a_dense_one():
    (encoder, _), masks = networks(), equal_masks()[:1]
    packed = encoder(video(), masks, layers=(0, 1))
    dense = encoder(video(), masks[0].context_BK, layers=(0, 1))
    for one, other in zip(packed, dense, strict=True):
        assert_same(one, other.flatten(0, 1))


def test_tokens_are_embedded_alike_whether_more_or_fewer_are_asked_for_than_there_are():
    (encoder, _), masks = networks(), ragged_masks()
    many = [*masks, *masks, *masks]
    assert sum(context_tokens(many).per_mask) < CLIPS * GRID.num_tokens
    more = many * 2
    assert sum(context_tokens(more).per_mask) > CLIPS * GRID.num_tokens
    once, twice = encoder(video(), many), encoder(video(), more)
    assert_same(twice[: len(once)], once)


def test_what_stands_in_the_padding_is_never_read():
    pair, masks = networks(), ragged_masks()
    spoiled = []
    for mask in masks:
        context, target = mask.context_BK.clone(), mask.target_BK.clone()
        for row, length in zip(context, mask.context_lengths, strict=True):
            row[length:] = 44
        for row, length in zip(target, mask.target_lengths, strict=True):
            row[length:] = 44
        spoiled.append(replace(mask, context_BK=context, target_BK=target))
    encoder, predictor = pair
    clean = predictor(encoder(video(), masks), masks, GRID)
    assert torch.equal(predictor(encoder(video(), spoiled), spoiled, GRID), clean)


def test_each_mask_asks_with_its_own_token_if_told_so():
    config = PREDICTOR.model_copy(update={"mask_token_per_mask": True})
    pair, masks = networks(predictor=config), ragged_masks()
    encoder, predictor = pair
    packed = predictor(encoder(video(), masks), masks, GRID)
    separate = separate_passes(*pair, masks, per_mask=True)
    assert_same(packed, separate)
    assert (predictor(encoder(video(), masks), masks, GRID, mask_token=0) - packed).abs().max() > 0


def test_packed_targets_are_gathered_mask_after_mask_and_clip_after_clip():
    masks = ragged_masks()
    features = torch.arange(CLIPS * GRID.num_tokens).view(CLIPS, GRID.num_tokens, 1).float()
    tokens = target_tokens(masks)
    wanted = [
        features[clip, row[0]]
        for mask in masks
        for clip, row in enumerate(rows_of(mask.target_BK, mask.target_lengths))
    ]
    assert torch.equal(gather_packed(features, tokens), torch.cat(wanted))
    assert tokens.per_mask == (43, 69)
    assert tokens.packing.lengths == (20, 9, 14, 30, 31, 8)
    assert tokens.packing.offsets.tolist() == [0, 20, 29, 43, 73, 104, 112]
    assert tokens.packing.longest == 31


def test_runs_are_consecutive_sequences_of_one_length():
    packing = packing_of([4, 4, 7, 4], torch.device("cpu"))
    assert packing.runs() == ((2, 4), (1, 7), (1, 4))


def test_offsets_made_in_inference_mode_can_be_used_in_training():
    (encoder, predictor), masks = networks(), draw_masks(RAGGED, torch.Generator().manual_seed(9))
    with torch.inference_mode():
        predictor(encoder(video(), masks), masks, GRID)
    predictor(encoder(video(), masks), masks, GRID).sum().backward()
    assert encoder.patch_embed.proj.weight.grad is not None
