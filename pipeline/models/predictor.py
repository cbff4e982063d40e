"""The predictor: a narrow transformer that fills in the features of the tokens it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from pipeline.clip import Grid, MaskSet
from pipeline.config.section import Section
from pipeline.errors import ConfigError
from pipeline.models.attention import AttentionConfig
from pipeline.models.layers import LayerNorm, Linear, ModelDims, Route, blocks
from pipeline.models.network import Network
from pipeline.models.packing import (
    PackedTokens,
    Packing,
    context_tokens,
    packing_of,
    sequence_of_token,
    target_tokens,
)


class PredictorConfig(Section):
    """Size of the predictor; the defaults are the ones used with every encoder of V-JEPA 2."""

    width: PositiveInt = 384
    """Width of a token inside the predictor; an even multiple of `heads`."""
    depth: PositiveInt = 12
    """Number of blocks."""
    heads: PositiveInt = 12
    """Attention heads."""
    mlp_hidden: PositiveInt | None = None
    """Hidden width of the MLPs; defaults to 4 times `width`."""
    num_mask_tokens: PositiveInt = 1
    """Learned query vectors. V-JEPA 2 uses one; more are for `mask_token_per_mask`, or to load
    released weights, which carry unused ones."""
    mask_token_per_mask: bool = False
    """Each mask of a stage asks with a query vector of its own, as in V-JEPA 1; needs as many
    `num_mask_tokens` as masks."""
    depth_scaled_init: bool = True
    """Start deeper blocks with smaller outputs, as V-JEPA 2 does and V-JEPA 1 does not."""
    predict_context: bool = False
    """Predict the features of the context tokens too, through a second output layer, as V-JEPA
    2.1's dense loss needs."""

    @property
    def dims(self) -> ModelDims:
        """The predictor's numbers with the default filled in."""
        return ModelDims(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_hidden=self.mlp_hidden or 4 * self.width,
        )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        self.dims.check("predictor")
        return self


class Predictor(Network):
    """Predictor of V-JEPA 2 (arXiv 2506.09985, section 2.1).

    Parameter names are those of the released state dicts, with their list of mask tokens stacked
    into one parameter [num_mask_tokens, 1, 1, width]: unused ones then get a zero gradient rather
    than none, which every optimiser and ZeRO stage can handle.

    Args:
        config: Size.
        encoder_width: Width of the encoder.
        levels: Levels of the encoder: their features come and go one after the other along the
            channels. Several are taken in by a two-layer network (V-JEPA 2.1).
        attention: Kernel and positions.
        checkpoint_activations: Compute each block again in the backward pass.

    Raises:
        ConfigError: The attention backend is not installed.
    """

    def __init__(
        self,
        config: PredictorConfig,
        *,
        encoder_width: int,
        attention: AttentionConfig,
        checkpoint_activations: bool = False,
        levels: int = 1,
    ) -> None:
        super().__init__(
            config.dims, attention=attention, checkpoint_activations=checkpoint_activations
        )
        self.config = config
        self.predictor_embed = _embedding(levels, encoder_width, config.width)
        self.mask_tokens = nn.Parameter(torch.zeros(config.num_mask_tokens, 1, 1, config.width))
        self.predictor_blocks = blocks(config.dims, scaled=config.depth_scaled_init)
        self.predictor_norm = LayerNorm(config.width)
        self.predictor_proj = Linear(config.width, levels * encoder_width)
        if config.predict_context:
            self.predictor_proj_context = Linear(config.width, levels * encoder_width)

    def forward(
        self,
        context: Tensor,
        masks: MaskSet | Sequence[MaskSet],
        grid: Grid,
        mask_token: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicted features of the target tokens, those of all masks in one pass.

        Args:
            context: The encoder's features of the context tokens: [B, K, D] in the order of one
                mask, or packed [P, D] as the encoder gives them for several masks.
            masks: Which tokens are context and which are asked for; one mask or several.
            grid: The clip's real grid; it may be of any shape.
            mask_token: Which learned query vector stands at the target positions; by default the
                first, or with `mask_token_per_mask` each mask's own.

        Returns:
            [B, Kt, D] in the order of one mask's `target_BK`; for several masks packed [P, D] in
            the order of `packing.target_tokens`; D is `levels` times the encoder's width. With
            `predict_context` a pair of those: the targets', and the context tokens' in the order
            in which they came.

        Raises:
            ConfigError: There is no such mask token.
        """
        if not isinstance(masks, MaskSet):
            return self._predict(context, masks, grid, mask_token)
        out = self._predict(context.flatten(0, 1), (masks,), grid, mask_token)
        if isinstance(out, Tensor):
            return out.unflatten(0, masks.target_BK.shape)
        return out[0].unflatten(0, masks.target_BK.shape), out[1].unflatten(0, context.shape[:2])

    def _predict(
        self, context_PD: Tensor, masks: Sequence[MaskSet], grid: Grid, mask_token: int | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        context, target = context_tokens(masks), target_tokens(masks)
        num_context = sum(context.per_mask)
        if context_PD.shape[0] != num_context:
            raise ValueError(f"expected {num_context} context tokens, got {context_PD.shape[0]}")
        both = _joined(context, target, grid)
        index_P = torch.cat((context.index_P, target.index_P))
        x_PD = torch.cat((self.predictor_embed(context_PD), self._queries(target, mask_token)))
        # Each token is picked once: `index_select` has a cheaper backward pass than indexing.
        x_PD = self._place(x_PD, index_P, grid).index_select(0, both.order_P)
        rotary = self._rotary(index_P[both.order_P], grid)
        x_PD, _ = self._run(x_PD, rotary, Route(backend=self.backend, packing=both.packing))
        place_P = both.order_P.argsort()
        target_PD = self.predictor_norm(x_PD.index_select(0, place_P[num_context:]))
        if not self.config.predict_context:
            return self.predictor_proj(target_PD)
        again_PD = self.predictor_norm(x_PD.index_select(0, place_P[:num_context]))
        return self.predictor_proj(target_PD), self.predictor_proj_context(again_PD)

    def _stack(self) -> nn.ModuleList:
        return self.predictor_blocks

    def _queries(self, target: PackedTokens, mask_token: int | None) -> Tensor:
        """The mask tokens [P, width] of all targets."""
        per_mask = self.config.mask_token_per_mask and mask_token is None
        names = range(len(target.per_mask)) if per_mask else (mask_token or 0,)
        counts = target.per_mask if per_mask else (sum(target.per_mask),)
        for name in names:
            if not 0 <= name < self.config.num_mask_tokens:
                raise ConfigError(
                    f"expected a mask token from 0 to {self.config.num_mask_tokens - 1}, "
                    f"got {name}",
                    remedy="Raise predictor.num_mask_tokens, or ask for one that is there.",
                )
        tokens_MD = self.mask_tokens.flatten(1)
        pairs = zip(names, counts, strict=True)
        return torch.cat([tokens_MD[name].expand(count, -1) for name, count in pairs])


def _embedding(levels: int, encoder_width: int, width: int) -> nn.Module:
    if levels == 1:
        return Linear(encoder_width, width)
    # Its output layer is numbered 2 in the released state dicts: the GELU counts.
    return nn.Sequential(
        Linear(levels * encoder_width, encoder_width), nn.GELU(), Linear(encoder_width, width)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Joined:
    """Context and target of each mask and clip as one sequence, sorted by place."""

    order_P: Tensor
    """Which token of [all contexts ; all targets] stands where."""
    packing: Packing


def _joined(context: PackedTokens, target: PackedTokens, grid: Grid) -> _Joined:
    # Attention does not care for order; sorted by position the sums run as in the reference.
    parts = [
        sequence_of_token(tokens.packing) * grid.num_tokens + tokens.index_P
        for tokens in (context, target)
    ]
    pairs = zip(context.packing.lengths, target.packing.lengths, strict=True)
    packing = packing_of([one + other for one, other in pairs], context.index_P.device)
    return _Joined(order_P=torch.cat(parts).argsort(), packing=packing)
