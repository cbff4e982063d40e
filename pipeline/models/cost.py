"""Exact parameter counts and forward FLOPs of the networks: arithmetic on their configs.

A FLOP count is twice the multiply-adds of the matrix products (linear layers, both products of
attention, patch convolution). Norms, GELU, softmax, rotations and additions count as nothing, as
is usual for model FLOPs; a backward pass costs twice the forward.
"""

from pipeline.models.encoder import EncoderConfig
from pipeline.models.layers import ModelDims
from pipeline.models.predictor import PredictorConfig


def encoder_params(config: EncoderConfig) -> int:
    """Parameters of the encoder."""
    dims = config.dims
    patch = _linear_params(_tubelet_values(config), dims.width)
    norms = max(1, len(config.levels)) * _norm_params(dims.width)
    return patch + _blocks_params(dims) + norms


def predictor_params(config: PredictorConfig, encoder_width: int, *, levels: int = 1) -> int:
    """Parameters of the predictor, its mask tokens included; `levels` as its constructor's."""
    dims = config.dims
    ends = _linear_params(encoder_width, dims.width)
    if levels > 1:
        ends += _linear_params(levels * encoder_width, encoder_width)
    num_outputs = 2 if config.predict_context else 1
    ends += num_outputs * _linear_params(dims.width, levels * encoder_width)
    mask_tokens = config.num_mask_tokens * dims.width
    return ends + mask_tokens + _blocks_params(dims) + _norm_params(dims.width)


def encoder_flops(config: EncoderConfig, tokens: int, *, embedded: int | None = None) -> float:
    """FLOPs of encoding one clip, forward only.

    Args:
        config: The encoder.
        tokens: Tokens that go through the blocks.
        embedded: Tokens that are embedded, if not the same: several masks that together keep more
            tokens than the clip has embed each of its tokens once.
    """
    dims = config.dims
    num_embedded = tokens if embedded is None else embedded
    patch = _linear_flops(num_embedded, _tubelet_values(config), dims.width)
    return patch + _blocks_flops(dims, tokens)


def predictor_flops(
    config: PredictorConfig, encoder_width: int, context: int, target: int, *, levels: int = 1
) -> float:
    """FLOPs of one prediction for one clip, forward only.

    Args:
        config: The predictor.
        encoder_width: Width of the encoder's features.
        context: Context tokens, projected in, and out again if they are predicted too.
        target: Target tokens, projected out.
        levels: Levels of the encoder.
    """
    dims = config.dims
    ends = _linear_flops(context, encoder_width, dims.width)
    if levels > 1:
        ends += _linear_flops(context, levels * encoder_width, encoder_width)
    predicted = target + context if config.predict_context else target
    ends += _linear_flops(predicted, dims.width, levels * encoder_width)
    return ends + _blocks_flops(dims, context + target)


def _tubelet_values(config: EncoderConfig) -> int:
    """Numbers in one token's pixels: 3 colours of tubelet_size patches."""
    return 3 * config.tubelet_size * config.patch_size**2


def _linear_params(num_in: int, num_out: int) -> int:
    return num_in * num_out + num_out


def _norm_params(width: int) -> int:
    return 2 * width


def _blocks_params(dims: ModelDims) -> int:
    attention = _linear_params(dims.width, 3 * dims.width) + _linear_params(dims.width, dims.width)
    mlp = _linear_params(dims.width, dims.mlp_hidden) + _linear_params(dims.mlp_hidden, dims.width)
    return dims.depth * (attention + mlp + 2 * _norm_params(dims.width))


def _linear_flops(tokens: int, num_in: int, num_out: int) -> float:
    return 2.0 * tokens * num_in * num_out


def _blocks_flops(dims: ModelDims, tokens: int) -> float:
    # qkv and output projection are four width² products; scores and their sum over the values are
    # one tokens² · width product each, whatever the number of heads.
    projections = _linear_flops(tokens, dims.width, 4 * dims.width)
    mlp = _linear_flops(tokens, dims.width, 2 * dims.mlp_hidden)
    attention = _linear_flops(tokens, tokens, 2 * dims.width)
    return dims.depth * (projections + mlp + attention)
