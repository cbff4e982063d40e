"""Bounds of memory and processor time around one decode, kept by the kernel.

A decoder can allocate or loop without ever returning to Python, so nothing in Python can stop it.
A loader worker is disposable: it decodes in its own process, and the kernel ends the decode (no
memory: an error) or the worker (no time left: SIGPROF). Two system calls a clip, instead of the
copy of every picture that a process of its own for the decoder would cost.
"""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from pipeline.config.section import Section
from pipeline.data.badmedia import BadMediaError, BadReason

# The decoder's own clock, read between packets, comes first and costs no worker.
_SPARE_SECONDS = 2.0
_PAGE_BYTES = resource.getpagesize()
_STATM = "/proc/self/statm"


class DecodeLimits(Section):
    """What one video may cost before it is refused."""

    max_pixels: int = Field(default=4096 * 2304, gt=0)
    """Width times height of the largest picture accepted."""
    max_bytes: int = Field(default=1 << 30, gt=0)
    """Size of the largest file accepted, in bytes."""
    max_clip_bytes: int = Field(default=1 << 30, gt=0)
    """Size of the largest decoded clip (frames × height × width × 3) accepted, in bytes."""
    max_memory_bytes: int = Field(default=2 << 30, gt=0)
    """Address space that one decode may add to its loader worker, in bytes, its clip included."""
    max_seconds: float = Field(default=20.0, gt=0)
    """Processor time one decode may take, in seconds."""


@contextmanager
def confined(limits: DecodeLimits, *, held_bytes: int = 0) -> Iterator[None]:
    """One decode under the kernel's eyes; only for a process that may die, such as a worker.

    Address space is counted, not resident memory: it is what the kernel can bound, and it is
    never less. The clock is the processor's, so a machine that is overloaded refuses no video.

    Args:
        limits: What the decode may cost.
        held_bytes: What the caller keeps of it meanwhile, which is not the decoder's.

    Raises:
        BadMediaError: The decode asked for more memory than `limits.max_memory_bytes`.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    _allow(_address_space_bytes() + limits.max_memory_bytes + held_bytes, before)
    signal.setitimer(signal.ITIMER_PROF, limits.max_seconds + _SPARE_SECONDS)
    try:
        yield
    except MemoryError as error:
        raise BadMediaError(
            BadReason.MEMORY_LIMIT, f"decoding takes more than {limits.max_memory_bytes} bytes"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _allow(num_bytes: int, before: tuple[int, int]) -> None:
    """Lowers the soft limit; one that is lower already, set from outside, stands."""
    soft, hard = before
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([num_bytes, *limits]), hard))


def _address_space_bytes() -> int:
    descriptor = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(descriptor, 64).split()[0]) * _PAGE_BYTES
    finally:
        os.close(descriptor)
