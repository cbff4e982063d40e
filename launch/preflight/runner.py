"""Runs one check, for a limited time: a dead file server must not hang the check of it."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from launch.preflight.finding import Finding
from pipeline.errors import ExitCode, JepaError

_CODES = (ExitCode.CONFIG, ExitCode.STORAGE, ExitCode.PEER_LOST)


class Runner:
    """Runs checks one after the other.

    Args:
        deadline: When all must be over, on the monotonic clock.
        node: This machine.
    """

    def __init__(self, deadline: float, node: str) -> None:
        self._deadline, self._node = deadline, node
        self.at = ""
        self.is_stuck = False
        """True if a check never ended: its thread is still there."""

    def run(
        self,
        name: str,
        check: Callable[[], Finding],
        *,
        limit_seconds: float,
        exit_code: ExitCode = ExitCode.PEER_LOST,
        progress: Mapping[str, Any] | None = None,
    ) -> Finding:
        """The check's finding, or one that says why there is none.

        Args:
            name: Of the check.
            check: What to call.
            limit_seconds: How long it may take; less if the whole time runs out before.
            exit_code: What it means if the check does not end, or breaks.
            progress: What the check was at, for that finding.
        """
        self.at, begin = "", time.monotonic()
        box: list[Finding] = []
        thread = threading.Thread(
            target=lambda: box.append(_told(name, check, self._node, exit_code)),
            name=name,
            daemon=True,
        )
        thread.start()
        thread.join(max(0.1, min(limit_seconds, self._deadline - begin)))
        seconds = time.monotonic() - begin
        if box:
            return replace(box[0], seconds=seconds)
        at = str((progress or {}).get("at", self.at))
        what = f" of {at}" if at else ""
        self.is_stuck = self.is_stuck or thread.is_alive()
        return Finding(
            name=name,
            state="fail",
            expected="an answer",
            got=f"no answer{what} within {seconds:.0f} s",
            remedy="Look at this machine: what it asked hangs (storage, network, device).",
            nodes=(self._node,),
            exit_code=exit_code,
            seconds=seconds,
            values=dict(progress or {}),
        )


def _told(name: str, check: Callable[[], Finding], node: str, broken: ExitCode) -> Finding:
    try:
        return check()
    except JepaError as error:
        code = error.exit_code if error.exit_code in _CODES else ExitCode.CONFIG
        got, remedy = str(error), error.remedy
    except (OSError, RuntimeError, ValueError) as error:
        # What all machines share, such as storage, is no machine's fault.
        code, got = broken, f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"
        remedy = "Look at this machine."
    return Finding(name=name, state="fail", got=got, remedy=remedy, nodes=(node,), exit_code=code)
