"""The building blocks of encoder and predictor: initialised leaves and the transformer block.

Each leaf class finishes its initialisation inside its own `__init__`. Under `deepspeed.zero.Init`
a module's parameters are cut into shards the moment its outermost `__init__` returns, and code
that touched `.weight` afterwards would write to an empty tensor without an error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.attention import Backend, attend
from pipeline.models.packing import Packing
from pipeline.models.rope import MIN_HEAD_DIM, turn_projected

CompiledBlock = Callable[["Block", Tensor, Tensor | None, "Route"], Tensor]

INIT_STD = 0.02
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How attention runs in one pass; the same for all layers of a network."""

    backend: Backend
    packing: Packing | None = None
    """Where the sequences of a packed pass lie; None for clips of one length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDims:
    """Size of a stack of transformer blocks."""

    width: int
    depth: int
    heads: int
    mlp_hidden: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    def check(self, name: str) -> None:
        """Refuse a width that cannot be cut into heads that rotary positions can turn.

        Raises:
            ValueError: With the nearest right widths; pydantic turns it into a config mistake.
        """
        # An even head width keeps every element of the tail in a pair of its own.
        unit = 2 * self.heads
        smallest = MIN_HEAD_DIM * self.heads
        if self.width % unit == 0 and self.width >= smallest:
            return
        below = max(self.width // unit * unit, smallest)
        above = max(below, -(-self.width // unit) * unit)
        nearest = f"{below}" if below == above else f"{below} or {above}"
        raise ValueError(
            f"{name} width {self.width} cannot be cut into {self.heads} heads of an even width of "
            f"at least {MIN_HEAD_DIM}: the nearest right width is {nearest}, or change heads"
        )


class Linear(nn.Linear):
    """Linear layer with bias, truncated-normal weights (0.02) and zero bias.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        residual_layer: 1-based number of the block whose residual branch this layer ends; its
            weights are divided by sqrt(2 · residual_layer), so that the residual stream does not
            grow with depth.
    """

    def __init__(
        self, in_features: int, out_features: int, *, residual_layer: int | None = None
    ) -> None:
        super().__init__(in_features, out_features)
        if residual_layer is not None:
            with torch.no_grad():
                self.weight.div_(math.sqrt(2 * residual_layer))

    def reset_parameters(self) -> None:
        """Called by torch's constructor; replaces its own initialisation."""
        _init_projection(self)


class PatchConv(nn.Conv3d):
    """The patch embedding's convolution: kernel and stride are one tubelet of `patch` pixels.

    Patches do not overlap, so it is a matrix product of cut-out patches, which is faster than a
    convolution on every device and need not see the patches that nobody asks for.
    """

    def __init__(self, width: int, *, tubelet_size: int, patch_size: int) -> None:
        kernel = (tubelet_size, patch_size, patch_size)
        super().__init__(3, width, kernel_size=kernel, stride=kernel)

    def forward(self, input: Tensor) -> Tensor:
        """Patches […, colour · time · height · width] → […, D]."""
        return F.linear(input, self.weight.flatten(1), self.bias)

    def cut(self, video_BCTHW: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] → patches [B, N, values], in (t, h, w) order, w fastest."""
        time, height, width = self.kernel_size
        tubes = video_BCTHW.unflatten(4, (-1, width)).unflatten(3, (-1, height))
        tubes = tubes.unflatten(2, (-1, time))  # [B, C, t, time, h, height, w, width]
        return tubes.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def reset_parameters(self) -> None:
        """Called by torch's constructor; replaces its own initialisation."""
        _init_projection(self)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with epsilon 1e-6 whose output keeps the input's dtype, under autocast too."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return super().forward(input).to(input.dtype)


class Attention(nn.Module):
    """Self-attention with one fused [q | k | v] projection and rotary positions."""

    def __init__(self, dims: ModelDims, *, layer: int | None) -> None:
        super().__init__()
        self.heads = dims.heads
        self.qkv = Linear(dims.width, 3 * dims.width)
        self.proj = Linear(dims.width, dims.width, residual_layer=layer)

    def forward(self, x: Tensor, rotary: Tensor | None, route: Route) -> Tensor:
        """[…, D] → […, D]; see `Block.forward`."""
        query, key, value = split_heads(self.qkv(x), rotary, self.heads)
        return self.proj(attend(query, key, value, route.backend, route.packing).flatten(-2))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, dims: ModelDims, *, layer: int | None) -> None:
        super().__init__()
        self.fc1 = Linear(dims.width, dims.mlp_hidden)
        self.fc2 = Linear(dims.mlp_hidden, dims.width, residual_layer=layer)

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, dims: ModelDims, *, layer: int | None) -> None:
        super().__init__()
        self.compiled: CompiledBlock | None = None
        self.norm1 = LayerNorm(dims.width)
        self.attn = Attention(dims, layer=layer)
        self.norm2 = LayerNorm(dims.width)
        self.mlp = Mlp(dims, layer=layer)

    def forward(self, x: Tensor, rotary: Tensor | None, route: Route) -> Tensor:
        """One layer on [B, N, D] clips or, if the route is packed, on [P, D] tokens.

        Args:
            x: The residual stream.
            rotary: As `rope.rotary_tables` returns it; None without rotary positions.
            route: Kernel and, for a packed call, the ends of the sequences.
        """
        if self.compiled is not None:
            return self.compiled(self, x, rotary, route)
        x = x + self.attn(self.norm1(x), rotary, route)
        return x + self.mlp(self.norm2(x))


def split_heads(qkv: Tensor, rotary: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projected tokens […, 3 D] as query, key and value […, heads, head_dim], places turned in."""
    qkv = qkv.unflatten(-1, (3, heads, -1))
    if rotary is not None:
        return turn_projected(qkv, rotary)
    query, key, value = qkv.unbind(-3)
    return query, key, value


def blocks(dims: ModelDims, *, scaled: bool = True) -> nn.ModuleList:
    """The stack of a network's blocks; layers are numbered from 1 for the initialisation.

    With `scaled` what a block adds to the residual stream starts smaller the deeper it stands.
    """
    return nn.ModuleList(Block(dims, layer=i + 1 if scaled else None) for i in range(dims.depth))


def gather_tokens(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens [B, K, D] that stand at `index_BK` in each clip."""
    return x_BND.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def _init_projection(layer: nn.Linear | nn.Conv3d) -> None:
    weight, bias = layer.weight, layer.bias
    with torch.no_grad():
        if bias is not None:
            bias.zero_()
        if weight.is_meta:
            return
        # Drawn in float32 on the CPU wherever the weight lies and whatever its dtype, so that one
        # seed gives one network on every machine. The cut at ±2 is 100 standard deviations away.
        drawn = weight.to("cpu", torch.float32, copy=True)
        nn.init.trunc_normal_(drawn, std=INIT_STD, a=-2.0, b=2.0)
        weight.copy_(drawn)
