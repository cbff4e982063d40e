"""What encoder and predictor share: a stack of blocks, and how it is run."""

from abc import abstractmethod
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.clip import Grid
from pipeline.errors import ConfigError
from pipeline.models.attention import AttentionConfig, Backend, check_backend
from pipeline.models.compiled import Compiler, compile_block
from pipeline.models.layers import Block, ModelDims, Route
from pipeline.models.positions import sincos_positions
from pipeline.models.rope import rotary_tables


class Network(nn.Module):
    """Base of encoder and predictor.

    Args:
        dims: Size of the blocks.
        attention: Kernel and positions.
        checkpoint_activations: Start with all blocks recomputed; see `num_recomputed_blocks`.

    Raises:
        ConfigError: The attention backend is not installed.
    """

    def __init__(
        self, dims: ModelDims, *, attention: AttentionConfig, checkpoint_activations: bool
    ) -> None:
        super().__init__()
        check_backend(attention)
        self.dims = dims
        self.attention = attention
        self.backend: Backend = attention.backend
        """The kernel in use; may be changed between steps, as `fastest` does at every stage."""
        self._num_recomputed = dims.depth if checkpoint_activations else 0

    @property
    def num_recomputed_blocks(self) -> int:
        """How many blocks, counted from the first, are computed again in the backward pass.

        Each costs its forward pass once more and saves its activations. May be changed between
        steps, from 0 to all blocks; the first ones are taken because theirs are kept longest.
        """
        return self._num_recomputed

    @num_recomputed_blocks.setter
    def num_recomputed_blocks(self, number: int) -> None:
        if not 0 <= number <= self.dims.depth:
            raise ConfigError(
                f"expected 0 to {self.dims.depth} recomputed blocks, got {number}",
                remedy="Ask for no more blocks than the network has.",
            )
        self._num_recomputed = number

    def compile_blocks(
        self, *, dynamic: bool | None = None, backend: Compiler = "inductor"
    ) -> None:
        """Let torch generate code for the blocks; may be called again for a new stage.

        Works beside recomputation and all ZeRO stages: see `models.compiled`. The first pass of
        each kind (training, without gradients) then takes a minute or so.

        Args:
            dynamic: True for token counts that change from step to step, False for those that
                never do, None to find out.
            backend: torch's name of the compiler, or one of its own kind.

        Raises:
            ConfigError: The machine has no compiler.
        """
        device = next(self.parameters()).device
        compiled = compile_block(dynamic=dynamic, backend=backend, device=device)
        for block in self._stack():
            cast("Block", block).compiled = compiled

    def _place(self, x: Tensor, index: Tensor, grid: Grid) -> Tensor:
        """Tokens [*index.shape, D] with what tells them their place added, if anything is."""
        if self.attention.positions == "rope":
            return x
        uniform = self.attention.uniform_power
        return x + sincos_positions(index, grid, self.dims.width, uniform_power=uniform).to(x.dtype)

    def _rotary(self, index: Tensor, grid: Grid) -> Tensor | None:
        style = self.attention.rotary
        return None if style is None else rotary_tables(index, grid, self.dims.head_dim, style)

    def _run(
        self, x: Tensor, rotary: Tensor | None, route: Route, wanted: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The residual stream after the last block, and after the `wanted` ones."""
        taken: dict[int, Tensor] = {}
        for layer, block in enumerate(self._stack()):
            if layer < self._num_recomputed and torch.is_grad_enabled():
                # No random numbers are drawn in a block, so their state need not be kept.
                options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(block, x, rotary, route, **options)
            else:
                x = block(x, rotary, route)
            if layer in wanted:
                taken[layer] = x
        return x, taken

    @abstractmethod
    def _stack(self) -> nn.ModuleList:
        """The blocks; each network has its own name for them in its state dict."""
