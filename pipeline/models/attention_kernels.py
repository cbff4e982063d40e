"""The attention kernels there are: what each takes, where it runs, and how it is called.

A kernel has a dense form, [B, N, heads, head_dim], and, where its library packs, a packed form,
[P, heads, head_dim]. Libraries are imported when a kernel is asked for, never before.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.models.packing import Packing, packing_of

Kernel = Literal[
    "math",
    "sdpa",
    "sdpa-flash",
    "sdpa-cudnn",
    "sdpa-efficient",
    "sdpa-math",
    "flash2",
    "flash3",
    "flash4",
    "varlen",
]
Qkv = tuple[Tensor, Tensor, Tensor]

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Library:
    """A package with a dense and a packed function of flash-attn's shape."""

    module: str
    packed: str
    dense: str | None = None
    """Without one, equal sequences are packed."""
    scale: str = "softmax_scale"
    """What the package calls the factor on the scores."""
    limits: tuple[str, ...] = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    """What it calls the sequences' offsets and greatest lengths."""
    widths: tuple[int, ...] = ()
    """Head widths that it has kernels for; any multiple of 8 if empty."""
    install: str = "pip install 'jepa-pipeline[gpu]'"


_LIBRARIES: dict[str, _Library] = {
    "flash2": _Library(
        module="flash_attn", dense="flash_attn_func", packed="flash_attn_varlen_func"
    ),
    "flash3": _Library(
        module="flash_attn_interface",
        dense="flash_attn_func",
        packed="flash_attn_varlen_func",
        install="build it from the folder hopper/ of the flash-attention repository",
    ),
    "flash4": _Library(
        module="flash_attn.cute",
        dense="flash_attn_func",
        packed="flash_attn_varlen_func",
        widths=(64, 96, 128),
        install="pip install flash-attn-4",
    ),
    "varlen": _Library(
        module="torch.nn.attention.varlen",
        packed="varlen_attn",
        scale="scale",
        limits=("cu_seq_q", "cu_seq_k", "max_q", "max_k"),
        install="use a torch that has torch.nn.attention.varlen",
    ),
}
_SDPA: dict[str, SDPBackend] = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


def packs(kernel: Kernel) -> bool:
    """Whether a kernel takes sequences of different lengths in one call."""
    return kernel in _LIBRARIES


def why_not_installed(kernel: Kernel) -> str | None:
    """Why a kernel cannot be had on this machine, in one line; None if it can."""
    if kernel not in _LIBRARIES:
        return None
    found = _functions(kernel)
    return found if isinstance(found, str) else None


def how_to_install(kernel: Kernel) -> str:
    """What makes a kernel available."""
    return _LIBRARIES[kernel].install if kernel in _LIBRARIES else "install torch"


def why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot take tensors of this kind, in one line; None if it can."""
    if kernel in ("math", "sdpa", "sdpa-math"):
        return None
    if kernel == "sdpa-flash" and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if kernel != "sdpa-efficient" and dtype not in _HALF:
        return f"takes bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    return why_not_installed(kernel)


def run_dense(kernel: Kernel, qkv: Qkv) -> Tensor:
    """Attention of each clip's tokens to each other, [B, N, heads, head_dim]."""
    if kernel in _LIBRARIES:
        return _library_dense(kernel, qkv)
    if kernel == "math":
        return _math(qkv)
    if kernel == "sdpa":
        return _sdpa(qkv)
    padded, scale = _padded(qkv, 8 if qkv[2].is_cuda else 1)
    with sdpa_kernel(_SDPA[kernel]):
        return _sdpa(padded, scale)[..., : qkv[2].shape[-1]]


def run_packed(kernel: Kernel, qkv: Qkv, packing: Packing) -> Tensor:
    """Attention within each sequence of `packing`, [P, heads, head_dim]."""
    if kernel in _LIBRARIES:
        return _library_packed(kernel, qkv, packing)
    return run_groups(partial(run_dense, kernel), qkv, packing.runs())


def run_groups(dense: Callable[[Qkv], Tensor], qkv: Qkv, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Packed attention out of dense calls: one for each run of sequences of one length."""
    # One split, not many slices: its backward is one concatenation, not a sum of padded copies.
    parts = zip(*(x.split([count * length for count, length in runs]) for x in qkv), strict=True)
    outputs = [
        dense(tuple(x.unflatten(0, run) for x in part)).flatten(0, 1)  # pyright: ignore[reportArgumentType]
        for part, run in zip(parts, runs, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _math(qkv: Qkv) -> Tensor:
    query, key, value = qkv
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    weights = scores.float().softmax(dim=-1).to(value.dtype)
    return (weights @ value.transpose(1, 2)).transpose(1, 2)


def _sdpa(qkv: Qkv, scale: float | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in qkv)
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


def _library_dense(kernel: Kernel, qkv: Qkv) -> Tensor:
    if _LIBRARIES[kernel].dense is None:
        num_clips, num_tokens = qkv[0].shape[:2]
        packing = packing_of((num_tokens,) * num_clips, qkv[0].device)
        flat = tuple(x.flatten(0, 1) for x in qkv)
        out = _library_packed(kernel, flat, packing)  # pyright: ignore[reportArgumentType]
        return out.unflatten(0, (num_clips, num_tokens))
    function = _loaded(kernel)[0]
    padded, scale = _padded_for(kernel, qkv)
    return _first(function(*padded, **{_LIBRARIES[kernel].scale: scale}))[..., : qkv[2].shape[-1]]


def _library_packed(kernel: Kernel, qkv: Qkv, packing: Packing) -> Tensor:
    library, function = _LIBRARIES[kernel], _loaded(kernel)[1]
    padded, scale = _padded_for(kernel, qkv)
    offsets, longest = packing.offsets, packing.longest
    limits = dict(zip(library.limits, (offsets, offsets, longest, longest), strict=True))
    # Some versions of flash-attn 4 find the greatest lengths themselves and take none.
    taken = {name: limit for name, limit in limits.items() if name in _arguments(function)}
    out = function(*padded, **taken, **{library.scale: scale})
    return _first(out)[..., : qkv[2].shape[-1]]


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _first(result: Any) -> Tensor:
    """Some versions give the scores' logarithms beside the output."""
    return result[0] if isinstance(result, tuple) else result


def _padded_for(kernel: Kernel, qkv: Qkv) -> tuple[Qkv, float]:
    head_dim = qkv[0].shape[-1]
    fitting = [width for width in _LIBRARIES[kernel].widths if width >= head_dim]
    return _padded(qkv, fitting[0] if fitting else 8)


def _padded(qkv: Qkv, multiple: int) -> tuple[Qkv, float]:
    """Heads widened with zeros, which change no score, and the factor of the true width."""
    head_dim = qkv[0].shape[-1]
    missing = -head_dim % multiple
    if missing:
        query, key, value = (F.pad(x, (0, missing)) for x in qkv)
        qkv = (query, key, value)
    return qkv, head_dim**-0.5


def _loaded(kernel: Kernel) -> tuple[Callable[..., Any], Callable[..., Any]]:
    found = _functions(kernel)
    if isinstance(found, tuple):
        return found
    raise ImportError(found)


@cache
def _functions(kernel: Kernel) -> tuple[Callable[..., Any], Callable[..., Any]] | str:
    """The dense and the packed function of a library, or why they cannot be had."""
    library = _LIBRARIES[kernel]
    try:
        module = importlib.import_module(library.module)
        packed = getattr(module, library.packed)
        return (getattr(module, library.dense) if library.dense else packed), packed
    # A package built for another torch fails with a missing symbol, which is an OSError or an
    # ImportError; one that is only the shell of flash-attn 4 has no such attribute.
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return f"{library.module} cannot be imported: {error}".splitlines()[0]
