"""Errors that GPUs reported to the kernel (Xid): the driver keeps no list of them itself."""

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

# After these NVIDIA's catalogue of Xid errors asks for a reset or a repair; others, such as 13, 31,
# 43 and 45, are faults of programs. Double-bit memory errors, failed row remapping, NVLink, fallen
# off the bus, contained and uncontained memory errors, GPU System Processor.
_GRAVE = frozenset({48, 64, 74, 79, 94, 95, 119, 120, 140})
_LINE = re.compile(r"NVRM: Xid \((PCI:[0-9a-fA-F:.]+)\): (\d+)")
_KERNEL_LOG = Path("/dev/kmsg")
_DAY_SECONDS = 24 * 3600.0


def grave_xids(records: Iterable[str], uptime_seconds: float) -> list[str]:
    """Grave errors of the last day, as `79 of PCI:0000:4e:00`.

    Args:
        records: Of the kernel's log, as /dev/kmsg gives them: level, number, microseconds since
            the start, flags; a semicolon; the message.
        uptime_seconds: Now, on that clock.
    """
    found = []
    for record in records:
        head, _, message = record.partition(";")
        match = _LINE.search(message)
        words = head.split(",")
        if match is None or int(match[2]) not in _GRAVE or len(words) < 3:
            continue
        if words[2].isdigit() and uptime_seconds - int(words[2]) / 1e6 <= _DAY_SECONDS:
            found.append(f"{match[2]} of {match[1]}")
    return list(dict.fromkeys(found))


def kernel_log() -> list[str]:
    """The kernel's log from its beginning; empty where a container may not read it."""
    records = []
    try:
        handle = os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        while True:
            try:
                records.append(os.read(handle, 1 << 13).decode(errors="replace"))
            except BrokenPipeError:
                continue  # overwritten while it was read: the next one follows
    except OSError:
        return records  # no more
    finally:
        os.close(handle)


def uptime_seconds() -> float:
    """Seconds since the machine was started, on the kernel log's clock."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
