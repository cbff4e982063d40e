"""Which attention kernel runs; the only importer of flash-attn."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.section import Section
from pipeline.errors import ConfigError
from pipeline.models.rope import RopeMode

Backend = Literal["sdpa", "math", "flash2"]


class AttentionConfig(Section):
    """How attention is computed and how tokens know their place; one setting for all networks."""

    backend: Backend = "sdpa"
    """Kernel: `sdpa` is torch's own and picks the fastest there is, `flash2` the flash-attn package
    (NVIDIA GPUs, bf16), `math` the plain formula, slow and hungry, to compare the others with."""
    rope: RopeMode = "tiled"
    """Rotary layout: `tiled` as in V-JEPA 2 and its released weights, `interleaved` as in 2.1."""


def attend(query: Tensor, key: Tensor, value: Tensor, backend: Backend) -> Tensor:
    """Softmax attention of all tokens to all tokens.

    Args:
        query: [B, N, heads, head_dim], like `key` and `value`.
        key: Rotated keys.
        value: Values, not rotated.
        backend: The kernel.

    Returns:
        [B, N, heads, head_dim] in the dtype of `value`; scores are scaled by 1/sqrt(head_dim).

    Raises:
        ConfigError: `flash2` without the package, or on tensors it cannot take.
    """
    return _KERNELS[backend](query, key, value)


def check_backend(config: AttentionConfig) -> None:
    """Fail when a network is built, not hours later on its first batch.

    Raises:
        ConfigError: The backend's package is not installed.
    """
    if config.backend == "flash2" and importlib.util.find_spec("flash_attn") is None:
        raise _flash_missing("no module named flash_attn")


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return out.transpose(1, 2)


def _math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    weights = scores.float().softmax(dim=-1).to(value.dtype)
    return (weights @ value.transpose(1, 2)).transpose(1, 2)


def _flash2(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if value.device.type != "cuda" or value.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            "attention.backend flash2 expects bf16 or fp16 tensors on an NVIDIA GPU, "
            f"got {value.dtype} on {value.device.type}",
            remedy="Set the run's precision to bf16, or attention.backend to sdpa.",
        )
    return _flash_function()(query, key, value)


def _flash_function() -> Callable[..., Any]:
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except ImportError as error:
        raise _flash_missing(str(error)) from error


def _flash_missing(reason: str) -> ConfigError:
    return ConfigError(
        f"attention.backend flash2 needs flash-attn, which cannot be imported: {reason}",
        remedy="Install it with `pip install 'jepa-pipeline[gpu]'`, or set attention.backend=sdpa.",
    )


_KERNELS: dict[Backend, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": _sdpa,
    "math": _math,
    "flash2": _flash2,
}
