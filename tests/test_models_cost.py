"""Parameter counts and FLOPs: the reference's figures, the built modules, torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.clip import MaskSet
from pipeline.models.attention import AttentionConfig
from pipeline.models.cost import (
    encoder_flops,
    encoder_params,
    encoder_pass_flops,
    predictor_flops,
    predictor_params,
    predictor_pass_flops,
)
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.predictor import Predictor, PredictorConfig

MATH = AttentionConfig(backend="math")
ENCODERS = [
    ("vit_tiny", None, 5_633_856, 64),
    ("vit_small", None, 21_884_544, 64),
    ("vit_base", None, 86_236_416, 64),
    ("vit_large", None, 303_885_312, 64),
    ("vit_huge", None, 631_648_000, 80),
    ("vit_giant", None, 1_012_173_952, 88),
    ("vit_giant_xformers", None, 1_012_173_952, 64),
    ("vit_gigantic", None, 1_598_483_328, 104),
    ("vit_gigantic_xformers", None, 1_598_483_328, 64),
    ("vit_gigantic_xformers", 8192, 1_843_923_840, 64),
]
PREDICTORS = [("vit_large", 22_084_480), ("vit_huge", 22_281_344), ("vit_giant", 22_379_776)]
SMALL = EncoderConfig(width=48, heads=2, depth=3, mlp_hidden=100, patch_size=8)
SMALL_PREDICTOR = PredictorConfig(width=24, heads=2, depth=2, mlp_hidden=50, num_mask_tokens=3)


def num_params(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("size", "mlp_hidden", "expected", "head_dim"), ENCODERS)
def test_encoder_sizes_have_the_reference_parameter_counts(size, mlp_hidden, expected, head_dim):
    config = EncoderConfig(size=size, mlp_hidden=mlp_hidden)
    with torch.device("meta"):
        built = Encoder(config, attention=AttentionConfig())
    assert num_params(built) == expected
    assert encoder_params(config) == expected
    assert config.dims.head_dim == head_dim


@pytest.mark.parametrize(("size", "expected"), PREDICTORS)
def test_predictors_have_the_reference_parameter_counts(size, expected):
    config = PredictorConfig(num_mask_tokens=6)
    width = EncoderConfig(size=size).dims.width
    with torch.device("meta"):
        built = Predictor(config, encoder_width=width, attention=AttentionConfig())
    assert num_params(built) == expected
    assert predictor_params(config, width) == expected


def test_counts_follow_overrides_of_every_dimension():
    encoder = Encoder(SMALL, attention=MATH)
    predictor = Predictor(SMALL_PREDICTOR, encoder_width=48, attention=MATH)
    assert encoder_params(SMALL) == num_params(encoder)
    assert predictor_params(SMALL_PREDICTOR, 48) == num_params(predictor)


@pytest.mark.parametrize("keep", [None, 7])
def test_encoder_flops_equal_what_torch_counts(keep):
    encoder = Encoder(SMALL, attention=MATH)
    kept = None if keep is None else torch.arange(keep)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, 4, 32, 24), kept)
    num_tokens = SMALL.grid_of(4, 32, 24).num_tokens
    assert counter.get_total_flops() == encoder_flops(SMALL, keep or num_tokens)


def test_predictor_flops_equal_what_torch_counts():
    predictor = Predictor(SMALL_PREDICTOR, encoder_width=48, attention=MATH)
    mask = MaskSet(context_BK=torch.arange(5)[None], target_BK=torch.arange(9, 20)[None])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predictor(torch.zeros(1, 5, 48), mask, SMALL.grid(4, 32))
    assert counter.get_total_flops() == predictor_flops(SMALL_PREDICTOR, 48, 5, 11)


LEVELS = SMALL.model_copy(update={"levels": (0, 2)})
DENSE = SMALL_PREDICTOR.model_copy(update={"predict_context": True})


def ragged_masks():
    """Two masks of two clips that keep different numbers of tokens of their 32."""
    rows = torch.arange(32).expand(2, -1)
    return [
        MaskSet(
            context_BK=rows[:, :5],
            target_BK=rows[:, 9:20],
            context_lengths=(5, 3),
            target_lengths=(7, 11),
        ),
        MaskSet(context_BK=rows[:, :4], target_BK=rows[:, 9:15]),
    ]


@pytest.mark.parametrize(("encoder", "predictor"), [(SMALL, SMALL_PREDICTOR), (LEVELS, DENSE)])
@pytest.mark.parametrize("copies", [1, 4])
def test_flops_of_a_packed_pass_equal_what_torch_counts(encoder, predictor, copies):
    """Four times the masks keep more tokens than the clips have: each is embedded once."""
    masks, grid, levels = ragged_masks() * copies, SMALL.grid(4, 32), len(encoder.levels) or 1
    student = Encoder(encoder, attention=MATH)
    guesser = Predictor(predictor, encoder_width=48, attention=MATH, levels=levels)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        context = student(torch.zeros(2, 3, 4, 32, 32), masks, levels=True)
    assert counter.get_total_flops() == encoder_pass_flops(encoder, masks, grid)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        guesser(context, masks, grid)
    assert counter.get_total_flops() == predictor_pass_flops(predictor, 48, masks, levels)
    assert encoder_params(encoder) == num_params(student)
    assert predictor_params(predictor, 48, levels) == num_params(guesser)


def test_flops_of_a_full_size_clip_are_those_of_arithmetic_by_hand():
    # ViT-L, 16 frames at 256 px: 2048 tokens, 24 blocks.
    n, d = 2048, 1024
    per_block = 2 * n * 12 * d * d + 4 * n * n * d
    expected = 24 * per_block + 2 * n * 1536 * d
    assert encoder_flops(EncoderConfig(size="vit_large"), n) == expected
