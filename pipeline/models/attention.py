"""How attention is configured and called; its kernels stand in `attention_kernels`."""

from typing import Literal

from torch import Tensor

from pipeline.config.section import Section
from pipeline.errors import ConfigError
from pipeline.models.attention_kernels import (
    Kernel,
    how_to_install,
    run_dense,
    run_packed,
    why_not,
    why_not_installed,
)
from pipeline.models.packing import Packing
from pipeline.models.rope import RopeMode, RopePrecision, RotaryStyle

Backend = Kernel | Literal["fastest"]


class AttentionConfig(Section):
    """How attention is computed and how tokens know their place; one setting for all networks."""

    backend: Backend = "sdpa"
    """Kernel: `sdpa` is torch's own choice among its own, which `sdpa-flash`, `sdpa-cudnn`,
    `sdpa-efficient` and `sdpa-math` force; `flash2`, `flash3` and `flash4` are the flash-attn
    packages (NVIDIA GPUs, bf16), `varlen` torch's kernel for sequences of different lengths;
    `math` is the plain formula, slow and hungry, to compare the others with; `fastest` times
    those that run on this device at the start of each stage and takes the best."""
    positions: Literal["rope", "sincos"] = "rope"
    """How tokens know their place: `rope` turns queries and keys in every layer (V-JEPA 2);
    `sincos` adds a fixed table of sines and cosines to the tokens once (V-JEPA 1)."""
    rope: RopeMode = "tiled"
    """Rotary layout: `tiled` as in V-JEPA 2 and its released weights, `interleaved` as in 2.1."""
    rope_precision: RopePrecision = "fp32"
    """`fp32` computes rotary angles exactly; `reference-autocast` rounds them as the reference's
    bf16 training did (angles wrong by up to 0.03 rad), for studies that compare bit by bit."""
    rope_rescale: bool = False
    """Spread height and width positions of any size over the 16 places of a 256-pixel clip, as in
    V-JEPA 2.1; time is left as it is."""
    uniform_power: bool = True
    """For `sincos`: time, height and width get equal parts of a token, as in V-JEPA 1; otherwise
    time gets half."""

    @property
    def rotary(self) -> RotaryStyle | None:
        """The rotary positions, or None if there are none."""
        if self.positions == "sincos":
            return None
        return RotaryStyle(mode=self.rope, precision=self.rope_precision, rescale=self.rope_rescale)


def attend(
    query: Tensor, key: Tensor, value: Tensor, backend: Backend, packing: Packing | None = None
) -> Tensor:
    """Softmax attention of all tokens of a sequence to each other.

    Args:
        query: [B, N, heads, head_dim]; with `packing` [P, heads, head_dim]. Like `key`, `value`.
        key: Rotated keys.
        value: Values, not rotated.
        backend: The kernel; `fastest` is `sdpa` as long as nobody has timed the others.
        packing: Where the sequences of a packed call lie. Kernels that cannot pack run one dense
            call for each run of sequences of one length.

    Returns:
        Like `query`, in the dtype of `value`; scores are scaled by 1/sqrt(head_dim).

    Raises:
        ConfigError: The kernel is not installed, or cannot take these tensors.
    """
    kernel = kernel_of(backend)
    _check_takes(kernel, value)
    if packing is None:
        return run_dense(kernel, (query, key, value))
    return run_packed(kernel, (query, key, value), packing)


def kernel_of(backend: Backend) -> Kernel:
    """The kernel that a setting means while no other has been chosen."""
    return "sdpa" if backend == "fastest" else backend


def check_backend(config: AttentionConfig) -> None:
    """Fail when a network is built, not hours later on its first batch.

    Raises:
        ConfigError: The backend's package is not installed.
    """
    kernel = kernel_of(config.backend)
    reason = why_not_installed(kernel)
    if reason is not None:
        raise ConfigError(
            f"attention.backend {kernel} cannot be used here: {reason}",
            remedy=f"Install it ({how_to_install(kernel)}), or set attention.backend=sdpa.",
        )


def _check_takes(kernel: Kernel, value: Tensor) -> None:
    reason = why_not(kernel, value.device, value.dtype)
    if reason is not None:
        raise ConfigError(
            f"attention.backend {kernel} cannot be used here: {reason}",
            remedy="Set the run's precision to bf16 if that is what it takes, or "
            "attention.backend to sdpa or fastest.",
        )
