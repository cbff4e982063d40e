"""The video encoder: a Vision Transformer over tubelets with rotary positions in three axes."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from pipeline.clip import Grid, MaskSet
from pipeline.config.section import Section
from pipeline.errors import ConfigError
from pipeline.models.attention import AttentionConfig
from pipeline.models.layers import LayerNorm, ModelDims, PatchConv, Route, blocks
from pipeline.models.network import Network
from pipeline.models.packing import Packing, context_tokens

Size = Literal[
    "vit_tiny",
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_huge",
    "vit_giant",
    "vit_giant_xformers",
    "vit_gigantic",
    "vit_gigantic_xformers",
]

# width, depth, heads, MLP hidden. The gigantic ones have the hidden width that V-JEPA 2 really
# trains (4 · 1664); V-JEPA 2.1 means 8192, which `mlp_hidden: 8192` gives.
_SIZES: dict[Size, tuple[int, int, int, int]] = {
    "vit_tiny": (192, 12, 3, 768),
    "vit_small": (384, 12, 6, 1536),
    "vit_base": (768, 12, 12, 3072),
    "vit_large": (1024, 24, 16, 4096),
    "vit_huge": (1280, 32, 16, 5120),
    "vit_giant": (1408, 40, 16, 6144),
    "vit_giant_xformers": (1408, 40, 22, 6144),
    "vit_gigantic": (1664, 48, 16, 6656),
    "vit_gigantic_xformers": (1664, 48, 26, 6656),
}


class EncoderConfig(Section):
    """Size of the encoder and of its tokens."""

    size: Size = "vit_large"
    """Named size; `vit_giant_xformers` is the ViT-g of the V-JEPA 2 paper."""
    width: PositiveInt | None = None
    """Width of a token, if not the named size's; an even multiple of `heads`."""
    depth: PositiveInt | None = None
    """Number of blocks, if not the named size's."""
    heads: PositiveInt | None = None
    """Attention heads, if not the named size's."""
    mlp_hidden: PositiveInt | None = None
    """Hidden width of the MLPs; defaults to the named size's, or 4 times `width` if that is set."""
    patch_size: int = Field(default=16, ge=1)
    """Edge of a token in pixels."""
    tubelet_size: int = Field(default=2, ge=1)
    """Frames that one token spans."""
    depth_scaled_init: bool = True
    """Start deeper blocks with smaller outputs, as V-JEPA 2 does and V-JEPA 1 does not."""
    levels: tuple[NonNegativeInt, ...] = ()
    """0-based blocks whose outputs, each through a norm of its own, are learned together (V-JEPA
    2.1: 5, 11, 17, 23 of 24); the last must be the last block. Empty: the last block alone."""

    @property
    def dims(self) -> ModelDims:
        """The numbers behind the named size and its overrides."""
        width, depth, heads, hidden = _SIZES[self.size]
        if self.width is not None:
            width, hidden = self.width, 4 * self.width
        return ModelDims(
            width=width,
            depth=self.depth or depth,
            heads=self.heads or heads,
            mlp_hidden=self.mlp_hidden or hidden,
        )

    @property
    def levels_width(self) -> int:
        """Channels of all levels together."""
        return self.dims.width * max(1, len(self.levels))

    def grid(self, frames: int, resolution: int) -> Grid:
        """The token grid of a square clip.

        Raises:
            ConfigError: The clip cannot be cut into whole tokens.
        """
        return self.grid_of(frames, resolution, resolution)

    def grid_of(self, frames: int, height: int, width: int) -> Grid:
        """The token grid of a clip of any shape, in frames and pixels.

        Raises:
            ConfigError: The clip cannot be cut into whole tokens.
        """
        return Grid(
            t=_whole("frames", frames, "tubelet_size", self.tubelet_size),
            h=_whole("height", height, "patch_size", self.patch_size),
            w=_whole("width", width, "patch_size", self.patch_size),
        )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        self.dims.check("encoder")
        return self

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        last = self.dims.depth - 1
        if self.levels and (
            list(self.levels) != sorted(set(self.levels)) or self.levels[-1] != last
        ):
            raise ValueError(
                f"encoder levels must rise to the last block, {last}, got {list(self.levels)}"
            )
        return self


class PatchEmbed(nn.Module):
    """Pixels to tokens: one strided 3-D convolution, flattened in (t, h, w) order, w fastest."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.proj = PatchConv(
            config.dims.width, tubelet_size=config.tubelet_size, patch_size=config.patch_size
        )

    def forward(self, video_BCTHW: Tensor, rows: Tensor | None = None) -> Tensor:
        """[B, 3, T, H, W] → [B, N, D], or the tokens [*rows.shape, D] of the clips in a row.

        Fewer tokens than there are in the clips are cut out before they are embedded; more (masks
        may share tokens) are picked afterwards, so that no token is embedded twice for nothing.
        """
        patches_BNV = self.proj.cut(video_BCTHW)
        if rows is None:
            return self.proj(patches_BNV)
        if rows.numel() < patches_BNV.shape[0] * patches_BNV.shape[1]:
            return self.proj(_pick(patches_BNV, rows))
        return _pick(self.proj(patches_BNV), rows)


class Encoder(Network):
    """Vision Transformer of V-JEPA 2 (arXiv 2506.09985): no class token, no position table.

    Parameter names are those of the released state dicts. Weights are drawn from torch's global
    CPU generator; build it under `torch.device("meta")` for its shapes alone.

    Args:
        config: Size and token shape.
        attention: Kernel and positions.
        checkpoint_activations: Compute each block again in the backward pass instead of keeping
            its activations: about a third more compute for a fraction of the memory.

    Raises:
        ConfigError: The attention backend is not installed.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        attention: AttentionConfig,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(
            config.dims, attention=attention, checkpoint_activations=checkpoint_activations
        )
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = blocks(config.dims, scaled=config.depth_scaled_init)
        if config.levels:
            self.norms_block = nn.ModuleList(LayerNorm(config.dims.width) for _ in config.levels)
        else:
            self.norm = LayerNorm(config.dims.width)

    def forward(
        self,
        video_BCTHW: Tensor,
        keep: Tensor | Sequence[MaskSet] | None = None,
        layers: tuple[int, ...] = (),
        *,
        levels: bool = False,
    ) -> Tensor | list[Tensor]:
        """Features of a clip's tokens, after the final norm.

        With a micro-batch's masks the contexts of all of them go through the blocks in one pass,
        packed, whether or not clips keep equally many tokens:

            masks = batch.masks
            context_PD = encoder(video, masks)
            guess_PD = predictor(context_PD, masks, grid)
            wanted_PD = gather_packed(teacher(video), target_tokens(masks))
            by_mask = guess_PD.split(target_tokens(masks).per_mask)

        Tokens stand mask after mask, clip after clip (`packing.context_tokens`).

        Args:
            video_BCTHW: Normalised frames; cast to the weights' dtype.
            keep: Which tokens to encode: all of them if None, those of indices [B, K], or the
                contexts of several masks. Each keeps the position of its index.
            layers: 0-based blocks whose outputs are wanted, each put through the final norm, or
                the norm of its level if the encoder has levels.
            levels: Give the features of all the encoder's levels, one after the other along the
                channels: what its predictor takes, and what a teacher with levels teaches. The
                plain call gives the last level alone, which is what evaluations use.

        Returns:
            [B, N, D] or [B, K, D], packed [P, D] for masks; with `layers` a list of those, in the
            order of `layers`; with `levels` D is `config.levels_width`.

        Raises:
            ConfigError: The clip cannot be cut into whole tokens, or a layer is not there.
        """
        wanted = self.config.levels if levels else layers
        self._check_layers(layers)
        grid = self.config.grid_of(*video_BCTHW.shape[2:])
        index, rows, packing = _wanted(keep, grid, video_BCTHW.device)
        x = self.patch_embed(video_BCTHW.to(self.patch_embed.proj.weight.dtype), rows)
        x = self._place(x, index, grid)
        rotary = self._rotary(index, grid)
        route = Route(backend=self.backend, packing=packing)
        x, taken = self._run(x, rotary, route, wanted)
        if not wanted:
            return self._norm_of(self.config.dims.depth - 1)(x)
        outputs = [self._norm_of(layer)(taken[layer]) for layer in wanted]
        return torch.cat(outputs, dim=-1) if levels else outputs

    def _stack(self) -> nn.ModuleList:
        return self.blocks

    def _norm_of(self, layer: int) -> nn.Module:
        levels = self.config.levels
        return self.norms_block[levels.index(layer)] if levels else self.norm

    def _check_layers(self, layers: tuple[int, ...]) -> None:
        there = self.config.levels or range(len(self.blocks))
        if not set(layers) <= set(there):
            names = (
                f"among the levels {list(there)}"
                if self.config.levels
                else f"from 0 to {len(self.blocks) - 1}"
            )
            wrong = [layer for layer in layers if layer not in there]
            raise ConfigError(
                f"expected encoder layers {names}, got {wrong}",
                remedy="Name 0-based layers that this encoder has a norm for.",
            )


def _wanted(
    keep: Tensor | Sequence[MaskSet] | None, grid: Grid, device: torch.device
) -> tuple[Tensor, Tensor | None, Packing | None]:
    """Token indices, their rows among all clips' tokens, and their packing if they are packed."""
    if keep is None:
        return torch.arange(grid.num_tokens, device=device)[None], None, None
    if isinstance(keep, Tensor):
        first_B = torch.arange(keep.shape[0], device=device) * grid.num_tokens
        return keep, keep + first_B[:, None], None
    tokens = context_tokens(keep)
    return tokens.index_P, tokens.clip_P * grid.num_tokens + tokens.index_P, tokens.packing


def _pick(x_BND: Tensor, rows: Tensor) -> Tensor:
    return x_BND.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _whole(name: str, size: int, unit_name: str, unit: int) -> int:
    if size >= unit and size % unit == 0:
        return size // unit
    below = size // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    raise ConfigError(
        f"expected {name} to be a multiple of {unit_name} {unit}, got {size}",
        remedy=f"Set {name} to {nearest}, or change the encoder's {unit_name}.",
    )
