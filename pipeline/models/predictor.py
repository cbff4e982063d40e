"""The predictor: a narrow transformer that fills in the features of the tokens it is asked for."""

from typing import Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from pipeline.clip import Grid, MaskSet
from pipeline.config.section import Section
from pipeline.errors import ConfigError
from pipeline.models.attention import AttentionConfig, check_backend
from pipeline.models.layers import (
    LayerNorm,
    Linear,
    ModelDims,
    blocks,
    gather_tokens,
    run_block,
)
from pipeline.models.rope import rotary_tables


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
    """Learned query vectors; more than 1 only to load released weights, which carry unused ones."""

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


class Predictor(nn.Module):
    """Predictor of V-JEPA 2 (arXiv 2506.09985, section 2.1).

    Parameter names are those of the released state dicts, with their list of mask tokens stacked
    into one parameter [num_mask_tokens, 1, 1, width]: unused ones then get a zero gradient rather
    than none, which every optimiser and ZeRO stage can handle.

    Args:
        config: Size.
        encoder_width: Width of the encoder's features, taken in and given back.
        attention: Kernel and rotary layout.
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
    ) -> None:
        super().__init__()
        check_backend(attention)
        self.config = config
        self.attention = attention
        self.checkpoint_activations = checkpoint_activations
        self.predictor_embed = Linear(encoder_width, config.width)
        self.mask_tokens = nn.Parameter(torch.zeros(config.num_mask_tokens, 1, 1, config.width))
        self.predictor_blocks = blocks(config.dims, attention)
        self.predictor_norm = LayerNorm(config.width)
        self.predictor_proj = Linear(config.width, encoder_width)

    def forward(
        self, context_BKD: Tensor, mask: MaskSet, grid: Grid, mask_token: int = 0
    ) -> Tensor:
        """Predicted features of the target tokens.

        Args:
            context_BKD: The encoder's features of the context tokens, in the mask's order.
            mask: Which tokens are context and which are asked for.
            grid: The clip's real grid; it may be of any shape.
            mask_token: Which learned query vector stands at the target positions.

        Returns:
            [B, Kt, encoder_width], in the order of `mask.target_BK`.

        Raises:
            ConfigError: There is no such mask token.
        """
        query_BKD = self._queries(mask, mask_token)
        x_BND = torch.cat((self.predictor_embed(context_BKD), query_BKD), dim=1)
        index_BN = torch.cat((mask.context_BK, mask.target_BK), dim=1)
        # Attention does not care for order; sorted by position the sums run as in the reference.
        order_BN = index_BN.argsort(dim=1)
        x_BND = gather_tokens(x_BND, order_BN)
        head_dim = self.config.dims.head_dim
        rotary = rotary_tables(index_BN.gather(1, order_BN), grid, head_dim, self.attention.rope)
        for block in self.predictor_blocks:
            x_BND = run_block(block, x_BND, rotary, recompute=self.checkpoint_activations)
        place_BN = order_BN.argsort(dim=1)
        target_BKD = gather_tokens(x_BND, place_BN[:, context_BKD.shape[1] :])
        return self.predictor_proj(self.predictor_norm(target_BKD))

    def _queries(self, mask: MaskSet, mask_token: int) -> Tensor:
        if not 0 <= mask_token < self.config.num_mask_tokens:
            raise ConfigError(
                f"expected a mask token from 0 to {self.config.num_mask_tokens - 1}, "
                f"got {mask_token}",
                remedy="Raise predictor.num_mask_tokens, or ask for a mask token that is there.",
            )
        return self.mask_tokens[mask_token].expand(*mask.target_BK.shape, -1)
