"""NVIDIA's management library: what GPUs say of themselves beside what torch sees of them."""

from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_THERMAL = (
    "nvmlClocksEventReasonHwSlowdown",
    "nvmlClocksEventReasonHwThermalSlowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuHealth:
    """One GPU; what the library or the device does not tell is None or empty."""

    free_gib: float
    total_gib: float
    uncorrected_ecc: int | None
    """Memory errors since the driver was loaded that could not be corrected."""
    remapping_failed: bool
    """A row of memory that could not be replaced by a spare one."""
    remapping_pending: bool
    """A row that will be replaced at the next reset."""
    slowdowns: tuple[str, ...]
    """Reasons for which the hardware slows itself down now: heat, power."""


def nvml() -> ModuleType | None:
    """The library, if this machine has it and a GPU; light enough for a process that uploads."""
    try:
        import pynvml  # noqa: PLC0415 - optional
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def driver_version() -> str:
    """Version of the NVIDIA driver; empty without one."""
    library = nvml()
    if library is None:
        return ""
    with suppress(library.NVMLError):
        return str(library.nvmlSystemGetDriverVersion())
    return ""


def gpu_health(uuid: str) -> GpuHealth | None:
    """What a GPU says of itself.

    Args:
        uuid: Its name as torch tells it, with or without the leading `GPU-`.

    Returns:
        Its health; None without the library, or where it does not know the device.
    """
    library = nvml()
    if library is None:
        return None
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    with suppress(library.NVMLError):
        handle = library.nvmlDeviceGetHandleByUUID(name)
        memory = library.nvmlDeviceGetMemoryInfo(handle)
        failed, pending = _remapping(library, handle)
        return GpuHealth(
            free_gib=memory.free / 2**30,
            total_gib=memory.total / 2**30,
            uncorrected_ecc=_uncorrected(library, handle),
            remapping_failed=failed,
            remapping_pending=pending,
            slowdowns=_slowdowns(library, handle),
        )
    return None


def _uncorrected(library: ModuleType, handle: Any) -> int | None:
    with suppress(library.NVMLError):
        return library.nvmlDeviceGetTotalEccErrors(
            handle, library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, library.NVML_VOLATILE_ECC
        )
    return None


def _remapping(library: ModuleType, handle: Any) -> tuple[bool, bool]:
    """Whether a row's replacement has failed, and whether one waits for a reset."""
    with suppress(library.NVMLError):
        _correctable, _uncorrectable, pending, failed = library.nvmlDeviceGetRemappedRows(handle)
        return bool(failed), bool(pending)
    return False, False


def _slowdowns(library: ModuleType, handle: Any) -> tuple[str, ...]:
    with suppress(library.NVMLError, AttributeError):
        reasons = library.nvmlDeviceGetCurrentClocksEventReasons(handle)
        return tuple(
            name.removeprefix("nvmlClocksEventReason")
            for name in _THERMAL
            if reasons & getattr(library, name, 0)
        )
    return ()
