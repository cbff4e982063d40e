"""Several functions on Ray at a time; which of them ended, and how, is asked for."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.cluster import confine_worker
from pipeline.conduct.tasks import TaskNeeds, lost
from pipeline.errors import JepaError, UsageError

_CANCEL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A function that has ended: with a result, or with an error."""

    label: Any
    result: Any = None
    error: JepaError | None = None


class Pool:
    """Runs functions as Ray tasks with low priority.

    Args:
        ray: From `cluster.local_ray`.
        nice: Priority of all of them.
    """

    def __init__(self, ray: ModuleType, nice: int) -> None:
        self._ray, self._nice = ray, nice
        self._running: dict[Any, tuple[Any, TaskNeeds]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def submit(
        self, label: Any, function: Callable[..., Any], *args: Any, needs: TaskNeeds
    ) -> None:
        """Runs `function(*args, report=…)` when Ray has what it needs.

        Args:
            label: What `ended` calls it.
            function: A function of a module that the worker can import.
            args: Its arguments.
            needs: CPUs, GPUs and a name.
        """
        remote = self._ray.remote(
            num_cpus=needs.num_cpus, num_gpus=needs.num_gpus, max_retries=0, name=needs.describe
        )(_call)
        hide_gpus = needs.num_gpus == 0
        reference = remote.remote(str(Path.cwd()), self._nice, hide_gpus, function, args)
        self._running[reference] = (label, needs)

    def ended(self, timeout_seconds: float) -> list[Ended]:
        """Waits until one has ended, or the time is over; gives all that have."""
        if not self._running:
            return []
        references = list(self._running)
        ready, _ = self._ray.wait(
            references, num_returns=1, timeout=timeout_seconds, fetch_local=True
        )
        if ready:
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return [self._conclude(reference) for reference in ready]

    def cancel(self) -> None:
        """Ends all that run; nothing is waited for but their processes' end."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._running:
            every = list(self._running)
            self._ray.wait(every, num_returns=len(every), timeout=_CANCEL_SECONDS)
        self._running.clear()

    def _conclude(self, reference: Any) -> Ended:
        label, needs = self._running.pop(reference)
        exceptions = self._ray.exceptions
        try:
            return Ended(label=label, result=self._ray.get(reference))
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, JepaError):
                return Ended(label=label, error=error.cause)
            cause = error.cause
            return Ended(label=label, error=JepaError(f"{type(cause).__name__}: {cause}"))
        except exceptions.RayError as error:
            return Ended(label=label, error=lost(needs.describe, str(error)))


def _call(
    folder: str, nice: int, hide_gpus: bool, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Runs in the worker."""
    confine_worker(nice=nice, hide_gpus=hide_gpus)
    try:
        # Relative paths mean the same here as where the command was given.
        os.chdir(folder)
    except OSError as error:
        raise UsageError(
            f"this machine does not see {folder}, where the command was given: {error.strerror}",
            remedy="Give absolute paths on storage that all of the cluster's machines share.",
        ) from error
    return function(*args, report=_nobody)


def _nobody(_: Any) -> None:
    """Progress within a job is nobody's concern: its beginning and end are in the journal."""
