"""The peak that utilisation is a share of: stated by the maker, or measured on the device."""

import time
from dataclasses import dataclass
from typing import Literal

import torch

# Dense bf16 tensor-core TFLOP/s without sparsity, from NVIDIA's data sheets of the products. The
# first name that stands in the device's wins, so longer names come first.
_DATA_SHEETS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500.0),
    ("B300", 2250.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.5),
    ("H200 NVL", 835.5),
    ("H200", 989.5),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.5),
    ("H800", 989.5),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("A40", 149.7),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
)
_EDGE = {"cuda": 8192, "cpu": 1536}
_ROUNDS = 5
# A GPU that was idle takes a moment to raise its clocks; a handful of products is over before.
_LEAST_SECONDS = {"cuda": 0.5, "cpu": 0.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """TFLOP/s of one device, and where the number is from."""

    tflops: float
    source: str


def find_peak(
    wanted: float | Literal["measured"] | None, device: torch.device, dtype: torch.dtype
) -> Peak | None:
    """The peak that a run's utilisation is a share of.

    Args:
        wanted: `track.peak_tflops`: a number, `measured`, or None for the maker's figure.
        device: This rank's device.
        dtype: What networks compute in.

    Returns:
        The peak, or None if there is no figure for this device and precision.
    """
    if wanted == "measured":
        return Peak(tflops=measured_tflops(device, dtype), source="largest matrix product measured")
    if wanted is not None:
        return Peak(tflops=wanted, source="track.peak_tflops")
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    return stated_peak(torch.cuda.get_device_name(device))


def stated_peak(device_name: str) -> Peak | None:
    """The maker's figure for a device, in dense bf16; None if it is not in the table."""
    words = device_name.replace("-", " ").split()
    for name, tflops in _DATA_SHEETS:
        # Whole words: an L4 is no L40.
        if all(word in words for word in name.split()):
            return Peak(tflops=tflops, source=f"data sheet of {name}, dense bf16")
    return None


def measured_tflops(
    device: torch.device, dtype: torch.dtype, *, edge: int | None = None, rounds: int = _ROUNDS
) -> float:
    """TFLOP/s of the fastest of some large square matrix products: what this device can reach.

    Args:
        device: Where to measure.
        dtype: Of the factors.
        edge: Rows and columns; large enough for the device by default.
        rounds: Products that are timed at least; on a GPU half a second of them.
    """
    size = edge or _EDGE.get(device.type, _EDGE["cpu"])
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    _timed_product(left, right)  # which loads the library
    taken, least = [], _LEAST_SECONDS.get(device.type, 0.0)
    while len(taken) < rounds or sum(taken) < least:
        taken.append(_timed_product(left, right))
    return 2.0 * size**3 / min(taken) / 1e12


def utilisation(flops: float, seconds: float, peak: Peak | None, num_devices: int) -> float | None:
    """Share of the peak of all devices that FLOPs done in some seconds are; None without one."""
    if peak is None or seconds <= 0.0:
        return None
    return flops / seconds / (peak.tflops * 1e12 * num_devices)


def _timed_product(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    begin = time.perf_counter()
    torch.mm(left, right)
    _wait(left.device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
