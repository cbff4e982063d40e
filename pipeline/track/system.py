"""How busy the machine is: processor, memory, network, GPUs, under the names MLflow shows."""

from contextlib import suppress
from typing import Any

import psutil

from pipeline.nvidia import nvml


class SystemSampler:
    """Samples the whole machine, so it may run in another process than the one it watches.

    The names are those of MLflow's own system metrics: its page of that name then shows them.
    Network figures count from the sampler's start.
    """

    def __init__(self) -> None:
        self._network = psutil.net_io_counters()
        self._nvml = nvml()
        self._gpus: list[Any] = []
        if self._nvml is not None:
            count = self._nvml.nvmlDeviceGetCount()
            self._gpus = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        psutil.cpu_percent()  # The first call only sets the start of the interval it averages over.

    def sample(self) -> dict[str, float]:
        """The machine's use now; processor use is the mean since the sample before."""
        memory = psutil.virtual_memory()
        network = psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / 1e6,
        }
        for index, handle in enumerate(self._gpus):
            values |= self._gpu(index, handle)
        return {name: round(value, 2) for name, value in values.items()}

    def _gpu(self, index: int, handle: Any) -> dict[str, float]:
        library = self._nvml
        if library is None:
            return {}
        values: dict[str, float] = {}
        # One by one: a GPU cut into MIG instances, say, tells its memory but not its use.
        with suppress(library.NVMLError):
            memory = library.nvmlDeviceGetMemoryInfo(handle)
            values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
            values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
        with suppress(library.NVMLError):
            use = library.nvmlDeviceGetUtilizationRates(handle)
            values[f"gpu_{index}_utilization_percentage"] = float(use.gpu)
        with suppress(library.NVMLError):
            watts = library.nvmlDeviceGetPowerUsage(handle) / 1000
            values[f"gpu_{index}_power_usage_watts"] = watts
        return values
