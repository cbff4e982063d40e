"""Which attention kernel is the fastest here: those that run are timed on a stage's own shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import get_args

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.attention import attend
from pipeline.models.attention_kernels import Kernel, why_not
from pipeline.models.packing import Packing, packing_of

# Never the fastest, and with scores of all pairs of tokens too hungry to be tried on real shapes.
_NOT_TIMED = {"math": "keeps all scores in memory", "sdpa-math": "keeps all scores in memory"}
# What the kernels' own errors are: they compile at run time and check shapes in many ways.
_FAILURES = (
    ConfigError,
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    ImportError,
    AttributeError,
    KeyError,
    IndexError,
    OSError,
)
_SEED = 1234


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """One kind of attention call of a stage."""

    name: str
    """What it is for people: `encoder context`, `teacher`, `predictor`."""
    lengths: tuple[int, ...]
    """Tokens of each sequence of a micro-batch: of each clip, or of each mask and clip."""
    heads: int
    head_dim: int
    packed: bool
    """Whether the call is packed; a dense one has sequences of one length."""
    backward: bool = True
    """False for a teacher, which only goes forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One kernel on one shape: its time, or why it has none."""

    kernel: Kernel
    milliseconds: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionChoice:
    """The kernel to use for one shape, and what was measured."""

    shape: AttentionShape
    kernel: Kernel
    timings: tuple[Timing, ...]

    def lines(self) -> list[str]:
        """The table for the console: kernel, milliseconds or reason, the choice marked."""
        num_sequences, longest = len(self.shape.lengths), max(self.shape.lengths)
        title = (
            f"{self.shape.name}: {num_sequences} sequences of up to {longest} tokens, "
            f"{self.shape.heads} heads of {self.shape.head_dim}"
        )
        rows = [
            f"  {'*' if one.kernel == self.kernel else ' '} {one.kernel:<15}"
            + (one.reason if one.milliseconds is None else f"{one.milliseconds:.3f} ms")
            for one in self.timings
        ]
        return [title, *rows]


def choose_attention(
    shapes: Sequence[AttentionShape], device: torch.device, dtype: torch.dtype, *, rounds: int = 5
) -> tuple[AttentionChoice, ...]:
    """Times every kernel that runs here on every shape, forward and backward.

    For `attention.backend: fastest`. The caller times on one rank, sends the chosen names to the
    others (clocks differ, and ranks with different kernels would wait for each other), prints
    `lines()`, records the choice, and sets each network's `backend` at the start of the stage:

        student.backend, teacher.backend, predictor.backend = (c.kernel for c in choices)

    A kernel whose result is not that of `sdpa` within the rounding of `dtype` is never chosen.

    Args:
        shapes: What to time, one choice each.
        device: Where.
        dtype: What the networks compute in.
        rounds: Timed calls of each kernel, after two that are not; their median counts.
    """
    return tuple(_choose(shape, device, dtype, rounds) for shape in shapes)


def _choose(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, rounds: int
) -> AttentionChoice:
    call = _Call.of(shape, device, dtype)
    expected = call.run("sdpa")
    timings = tuple(_timing(kernel, call, expected, rounds) for kernel in get_args(Kernel))
    timed = [one for one in timings if one.milliseconds is not None]
    best = min(timed, key=lambda one: one.milliseconds or 0.0)
    return AttentionChoice(shape=shape, kernel=best.kernel, timings=timings)


def _timing(kernel: Kernel, call: "_Call", expected: list[Tensor], rounds: int) -> Timing:
    reason = _NOT_TIMED.get(kernel) or why_not(kernel, call.query.device, call.query.dtype)
    if reason is not None:
        return Timing(kernel=kernel, reason=reason)
    try:
        wrong = _greatest_difference(call.run(kernel), expected)
        if wrong > _tolerance(call.query.dtype):
            return Timing(kernel=kernel, reason=f"differs from sdpa by {wrong:.2g}")
        call.run(kernel)
        times = [_milliseconds(lambda: call.run(kernel), call.query.device) for _ in range(rounds)]
    except _FAILURES as error:
        text = str(error).strip() or type(error).__name__
        return Timing(kernel=kernel, reason=text.splitlines()[0][:120])
    return Timing(kernel=kernel, milliseconds=median(times))


@dataclass(frozen=True, kw_only=True)
class _Call:
    query: Tensor
    key: Tensor
    value: Tensor
    packing: Packing | None
    gradient: Tensor | None

    @classmethod
    def of(cls, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> "_Call":
        generator = torch.Generator().manual_seed(_SEED)
        tokens = (sum(shape.lengths),) if shape.packed else (len(shape.lengths), shape.lengths[0])
        size = (*tokens, shape.heads, shape.head_dim)
        drawn = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(4)]
        query, key, value = (x.requires_grad_(shape.backward) for x in drawn[:3])
        return cls(
            query=query,
            key=key,
            value=value,
            packing=packing_of(shape.lengths, device) if shape.packed else None,
            gradient=drawn[3] if shape.backward else None,
        )

    def run(self, kernel: Kernel) -> list[Tensor]:
        """The output and, if there is a backward pass, the three gradients."""
        with torch.set_grad_enabled(self.gradient is not None):
            out = attend(self.query, self.key, self.value, kernel, self.packing)
            if self.gradient is None:
                return [out]
            inputs = (self.query, self.key, self.value)
            return [out.detach(), *torch.autograd.grad(out, inputs, self.gradient)]


def _greatest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The greatest difference, as a share of the greatest value."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


def _tolerance(dtype: torch.dtype) -> float:
    # A few roundings of the greatest value; gradients are sums of many rounded terms.
    return 16 * torch.finfo(dtype).eps


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000.0 * (perf_counter() - begin)
