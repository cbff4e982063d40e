"""`python -m launch.ray_rank PARENT ARGUMENTS…`: becomes `python ARGUMENTS…`, and dies with PARENT.

Ray kills its workers outright when it starts a group again, and the processes that they started
would live on, in possession of GPU and run.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Asks the kernel to end us with the parent; execve keeps that wish."""
    parent, arguments = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died while we were starting
        sys.exit(0)
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - our own module


if __name__ == "__main__":
    main()
