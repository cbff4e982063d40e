"""The attentive probe of V-JEPA 2's evaluation.

Self-attention blocks over all tokens, one cross-attention block that gathers them with a learned
query, one linear layer. It sees no positions: whatever it knows about order, the encoder put into
its tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.layers import INIT_STD, Linear

PROBE_EPS = 1e-5  # the encoder's own norms use 1e-6; the published probes do not


class AttentiveProbe(nn.Module):
    """Frozen tokens to class logits through a learned attentive pooling.

    Args:
        width: Width D of the tokens.
        num_classes: Number of classes.
        num_heads: Attention heads; must divide `width`.
        num_blocks: Blocks in total: `num_blocks` - 1 of self-attention, then one of
            cross-attention.
        norm_eps: Of all its norms; transformers computes heads with 1e-6.
    """

    def __init__(
        self,
        *,
        width: int,
        num_classes: int,
        num_heads: int = 16,
        num_blocks: int = 4,
        norm_eps: float = PROBE_EPS,
    ) -> None:
        super().__init__()
        self.pooler = AttentivePooler(
            width=width, num_heads=num_heads, num_blocks=num_blocks, norm_eps=norm_eps
        )
        self.linear = Linear(width, num_classes)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Logits [B, classes] of tokens [B, N, D]."""
        return self.linear(self.pooler(tokens_BND))


class AttentivePooler(nn.Module):
    """Tokens [B, N, D] to one vector [B, D] per clip. Arguments as `AttentiveProbe`."""

    def __init__(
        self, *, width: int, num_heads: int, num_blocks: int, norm_eps: float = PROBE_EPS
    ) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.query_tokens, std=INIT_STD)
        num_self = num_blocks - 1
        self.blocks = nn.ModuleList(
            _SelfBlock(width=width, num_heads=num_heads, layer=layer, eps=norm_eps)
            for layer in range(1, num_self + 1)
        )
        # The published initialisation scales the cross block like the last block before it.
        self.cross_attention_block = _CrossBlock(
            width=width, num_heads=num_heads, layer=max(num_self, 1), eps=norm_eps
        )

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """One pooled vector per clip, [B, D]."""
        for block in self.blocks:
            tokens_BND = block(tokens_BND)
        query_B1D = self.query_tokens.expand(tokens_BND.shape[0], -1, -1)
        return self.cross_attention_block(query_B1D, tokens_BND).squeeze(1)


class _SelfBlock(nn.Module):
    """Pre-norm self-attention and MLP, `layer` counted from 1 for the initialisation."""

    def __init__(self, *, width: int, num_heads: int, layer: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _SelfAttention(width, num_heads, layer)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = _Mlp(width, layer)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class _CrossBlock(nn.Module):
    """The learned query gathers the tokens: the tokens are normalised, the query is not."""

    def __init__(self, *, width: int, num_heads: int, layer: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.xattn = _CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = _Mlp(width, layer)

    def forward(self, query_BQD: Tensor, tokens_BND: Tensor) -> Tensor:
        query_BQD = query_BQD + self.xattn(query_BQD, self.norm1(tokens_BND))
        return query_BQD + self.mlp(self.norm2(query_BQD))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, layer: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width, residual_layer=layer)

    def forward(self, x_BND: Tensor) -> Tensor:
        query, key, value = (_split(part, self.num_heads) for part in self.qkv(x_BND).chunk(3, -1))
        return self.proj(_merge(functional.scaled_dot_product_attention(query, key, value)))


class _CrossAttention(nn.Module):
    """Attention without an output projection, as in the published probe."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)

    def forward(self, query_BQD: Tensor, tokens_BND: Tensor) -> Tensor:
        query = _split(self.q(query_BQD), self.num_heads)
        key, value = (_split(part, self.num_heads) for part in self.kv(tokens_BND).chunk(2, -1))
        return _merge(functional.scaled_dot_product_attention(query, key, value))


class _Mlp(nn.Module):
    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width, residual_layer=layer)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x_BND)))


def _split(x_BND: Tensor, num_heads: int) -> Tensor:
    """[B, N, D] to [B, heads, N, D / heads]."""
    return x_BND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """[B, heads, N, D / heads] back to [B, N, D]."""
    return x.transpose(1, 2).flatten(-2)
