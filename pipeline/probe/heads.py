"""The heads that score a frozen encoder: attentive and linear probes, and nearest neighbours.

The attentive probe is the one of V-JEPA 2's evaluation: self-attention blocks over all tokens, one
cross-attention block that gathers them with a learned query, one linear layer. It sees no
positions: whatever it knows about order, the encoder put into its tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.layers import INIT_STD, Linear

_EPS = 1e-5  # the encoder's own norms use 1e-6; the published probes do not


class AttentiveProbe(nn.Module):
    """Frozen tokens to class logits through a learned attentive pooling.

    Args:
        width: Width D of the tokens.
        num_classes: Number of classes.
        num_heads: Attention heads; must divide `width`.
        num_blocks: Blocks in total: `num_blocks` - 1 of self-attention, then one of
            cross-attention.
    """

    def __init__(
        self, *, width: int, num_classes: int, num_heads: int = 16, num_blocks: int = 4
    ) -> None:
        super().__init__()
        self.pooler = AttentivePooler(width=width, num_heads=num_heads, num_blocks=num_blocks)
        self.linear = Linear(width, num_classes)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Logits [B, classes] of tokens [B, N, D]."""
        return self.linear(self.pooler(tokens_BND))


class AttentivePooler(nn.Module):
    """Tokens [B, N, D] to one vector [B, D] per clip. Arguments as `AttentiveProbe`."""

    def __init__(self, *, width: int, num_heads: int, num_blocks: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.query_tokens, std=INIT_STD)
        num_self = num_blocks - 1
        self.blocks = nn.ModuleList(
            _SelfBlock(width=width, num_heads=num_heads, layer=layer)
            for layer in range(1, num_self + 1)
        )
        # The published initialisation scales the cross block like the last block before it.
        self.cross_attention_block = _CrossBlock(
            width=width, num_heads=num_heads, layer=max(num_self, 1)
        )

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """One pooled vector per clip, [B, D]."""
        for block in self.blocks:
            tokens_BND = block(tokens_BND)
        query_B1D = self.query_tokens.expand(tokens_BND.shape[0], -1, -1)
        return self.cross_attention_block(query_B1D, tokens_BND).squeeze(1)


class LinearProbe(nn.Module):
    """Standardised features to class logits.

    Args:
        mean: Per-feature mean over the training clips, [F].
        std: Per-feature standard deviation over the training clips, [F].
        num_classes: Number of classes.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, *, mean: Tensor, std: Tensor, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        # A feature that never varies carries nothing; dividing by its zero would.
        self.register_buffer("scale", torch.where(std > 1e-6, 1 / std.clamp_min(1e-6), 0.0).float())
        self.linear = nn.Linear(mean.shape[0], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features_BF: Tensor) -> Tensor:
        """Logits [B, classes] of features [B, F]."""
        return self.linear((features_BF - self.mean) * self.scale)


def knn_scores(
    train_NF: Tensor,
    labels_N: Tensor,
    query_QF: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
) -> Tensor:
    """Share of the weighted vote that each class gets, [Q, classes].

    Features are centred on the training mean, so that the part common to all clips does not
    decide the cosine; the k nearest then vote with weight exp(cosine / temperature).
    """
    centre_F = train_NF.mean(dim=0)
    train_NF = functional.normalize(train_NF - centre_F, dim=1)
    k = min(k, train_NF.shape[0])
    shares: list[Tensor] = []
    for chunk_QF in query_QF.split(1024):  # bounds the table of cosines, not the result
        cosine_QN = functional.normalize(chunk_QF - centre_F, dim=1) @ train_NF.T
        nearest_Qk, index_Qk = cosine_QN.topk(k, dim=1)
        weight_Qk = (nearest_Qk / temperature).softmax(dim=1)
        votes = torch.zeros(chunk_QF.shape[0], num_classes, device=chunk_QF.device)
        shares.append(votes.scatter_add_(1, labels_N[index_Qk], weight_Qk))
    return torch.cat(shares)


class _SelfBlock(nn.Module):
    """Pre-norm self-attention and MLP, `layer` counted from 1 for the initialisation."""

    def __init__(self, *, width: int, num_heads: int, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = _SelfAttention(width, num_heads, layer)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = _Mlp(width, layer)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class _CrossBlock(nn.Module):
    """The learned query gathers the tokens: the tokens are normalised, the query is not."""

    def __init__(self, *, width: int, num_heads: int, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.xattn = _CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
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
