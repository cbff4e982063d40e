"""Exact parameter counts and forward FLOPs of the networks: arithmetic on their configs.

A FLOP count is twice the multiply-adds of the matrix products (linear layers, both products of
attention, patch convolution). Norms, GELU, softmax, rotations and additions count as nothing, as
is usual for model FLOPs; a backward pass costs twice the forward.
"""

from collections.abc import Sequence

from pipeline.clip import Grid, MaskSet
from pipeline.models.encoder import EncoderConfig
from pipeline.models.layers import ModelDims
from pipeline.models.packing import Lengths, context_lengths, target_lengths
from pipeline.models.predictor import PredictorConfig


def encoder_params(config: EncoderConfig) -> int:
    """Parameters of the encoder."""
    dims = config.dims
    patch = _linear_params(_tubelet_values(config), dims.width)
    return patch + _blocks_params(dims) + max(1, len(config.levels)) * _norm_params(dims.width)


def predictor_params(config: PredictorConfig, encoder_width: int, levels: int = 1) -> int:
    """Parameters of the predictor, its mask tokens included.

    Args:
        config: The predictor.
        encoder_width: Width of the encoder.
        levels: Levels of the encoder.
    """
    dims = config.dims
    inputs = _linear_params(encoder_width, dims.width)
    if levels > 1:
        inputs += _linear_params(levels * encoder_width, encoder_width)
    heads = 2 if config.predict_context else 1
    outputs = heads * _linear_params(dims.width, levels * encoder_width)
    mask_tokens = config.num_mask_tokens * dims.width
    return inputs + outputs + mask_tokens + _blocks_params(dims) + _norm_params(dims.width)


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
    return _patch_flops(config, num_embedded) + _blocks_flops(dims, tokens)


def predictor_flops(
    config: PredictorConfig, encoder_width: int, context: int, target: int, levels: int = 1
) -> float:
    """FLOPs of one prediction for one clip, forward only.

    Args:
        config: The predictor.
        encoder_width: Width of the encoder.
        context: Context tokens, projected in, and out again with `predict_context`.
        target: Target tokens, projected out.
        levels: Levels of the encoder.
    """
    dims = config.dims
    inputs = _linear_flops(context, encoder_width, dims.width)
    if levels > 1:
        inputs += _linear_flops(context, levels * encoder_width, encoder_width)
    projected = target + (context if config.predict_context else 0)
    outputs = _linear_flops(projected, dims.width, levels * encoder_width)
    return inputs + outputs + _blocks_flops(dims, context + target)


def encoder_pass_flops(config: EncoderConfig, masks: Sequence[MaskSet], grid: Grid) -> float:
    """FLOPs of encoding the contexts of all masks of a micro-batch in one pass, forward only.

    Exact for the tokens that each mask keeps of each clip, equally many or not, because attention
    costs the square of each sequence. Only the host is asked.
    """
    lengths: Lengths = sum((context_lengths(mask) for mask in masks), ())
    num_tokens = masks[0].context_BK.shape[0] * grid.num_tokens
    patch = _patch_flops(config, min(sum(lengths), num_tokens))
    return patch + sum(_blocks_flops(config.dims, length) for length in lengths)


def predictor_pass_flops(
    config: PredictorConfig, encoder_width: int, masks: Sequence[MaskSet], levels: int = 1
) -> float:
    """FLOPs of predicting the targets of all masks of a micro-batch in one pass, forward only."""
    return sum(
        predictor_flops(config, encoder_width, context, target, levels)
        for mask in masks
        for context, target in zip(context_lengths(mask), target_lengths(mask), strict=True)
    )


def _patch_flops(config: EncoderConfig, tokens: int) -> float:
    return _linear_flops(tokens, _tubelet_values(config), config.dims.width)


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
