"""Blocks compiled by torch: the arithmetic around attention, as functions of tensors alone.

What is compiled are two pure functions, one before and one after the attention kernel, to which a
block hands its weights. No module is traced, so the hooks by which ZeRO-3 gathers and frees
weights stay outside, and neither kernels nor the lengths of packed sequences can cause a new
compilation: the only size that changes is the number of tokens.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.attention import attend
from pipeline.models.layers import NORM_EPS, Block, LayerNorm, Linear, Route, split_heads

Compiler = str | Callable[..., Any]

# Sizes of one network for which code may be generated before torch gives up and runs it plainly.
# After the second size the number of tokens is a variable of the code, so few are ever needed.
_MAX_VERSIONS = 32


@dataclass(frozen=True, kw_only=True)
class CompiledBlock:
    """What runs a block in place of its own forward; shared by all blocks of a network."""

    before: Callable[..., Any]
    after: Callable[..., Any]

    def __call__(self, block: Block, x: Tensor, rotary: Tensor | None, route: Route) -> Tensor:
        """As `Block.forward`."""
        attention, mlp = block.attn, block.mlp
        query, key, value = self.before(
            x, rotary, attention.heads, _pair(block.norm1), _pair(attention.qkv)
        )
        mixed = attend(query, key, value, route.backend, route.packing)
        return self.after(
            x, mixed, _pair(attention.proj), _pair(block.norm2), _pair(mlp.fc1), _pair(mlp.fc2)
        )


def compile_block(
    *, dynamic: bool | None, backend: Compiler, device: torch.device
) -> CompiledBlock:
    """A compiled forward for all blocks of one network.

    Args:
        dynamic: True makes the number of tokens a variable from the start, for masks whose size
            changes at every step; False generates code for each size, the fastest for sizes that
            do not change within a stage; None begins so and turns to a variable when a second
            size comes.
        backend: torch's name of the compiler, or one of its own kind.
        device: Where the network will run.

    Raises:
        ConfigError: The machine has no compiler.
    """
    _check_compiler(backend, device)
    # Networks of different sizes share these functions: each keeps and counts its own versions.
    options: dict[str, Any] = {
        "dynamic": dynamic,
        "backend": backend,
        "recompile_limit": _MAX_VERSIONS,
        "isolate_recompiles": True,
    }
    return CompiledBlock(
        before=torch.compile(_before, **options), after=torch.compile(_after, **options)
    )


Pair = tuple[Tensor, Tensor]


def _before(
    x: Tensor, rotary: Tensor | None, heads: int, norm: Pair, qkv: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    return split_heads(F.linear(_normed(x, norm), *qkv), rotary, heads)


def _after(x: Tensor, mixed: Tensor, proj: Pair, norm: Pair, fc1: Pair, fc2: Pair) -> Tensor:
    x = x + F.linear(mixed.flatten(-2), *proj)
    return x + F.linear(F.gelu(F.linear(_normed(x, norm), *fc1)), *fc2)


def _normed(x: Tensor, norm: Pair) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *norm, NORM_EPS).to(x.dtype)


def _pair(layer: Linear | LayerNorm) -> Pair:
    return layer.weight, layer.bias


def _check_compiler(backend: Compiler, device: torch.device) -> None:
    if backend != "inductor":
        return
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif device.type == "cpu" and not _has_cpp_compiler():
        reason = "there is no C++ compiler"
    else:
        return
    raise ConfigError(
        f"blocks cannot be compiled for {device.type}: {reason}",
        remedy="Install it (triton comes with torch for NVIDIA GPUs; g++ or clang++ for the CPU), "
        "or switch compilation off.",
    )


def _has_cpp_compiler() -> bool:
    builder = importlib.import_module("torch._inductor.cpp_builder")
    errors = importlib.import_module("torch._inductor.exc")
    try:
        return bool(builder.get_cpp_compiler())
    except errors.InvalidCxxCompiler:
        return False
