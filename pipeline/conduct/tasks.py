"""One function on Ray: its progress comes back as it happens, its errors as they were raised."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from pipeline.cluster import local_ray
from pipeline.errors import JepaError, PeerLostError


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskNeeds:
    """What a task occupies while it runs, and what it is called in messages."""

    num_cpus: float
    num_gpus: float
    describe: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    """The last thing that a task sends."""

    value: Any


def run_as_task(
    function: Callable[..., Any],
    /,
    *args: Any,
    needs: TaskNeeds,
    report: Callable[[Any], None],
    address: str | None = None,
) -> Any:
    """Runs `function(*args, report=…)` as one Ray task and waits for what it returns.

    Ray is started for it on this machine, unless a cluster runs in this process already or
    `address` names one. Torch in the task uses as many threads as the task has CPUs.

    Args:
        function: A function of a module that the worker can import; takes a keyword `report`.
        args: Its arguments; they and the result travel pickled.
        needs: CPUs, GPUs and a name.
        report: Called here with whatever the function gives to its own `report`.
        address: Cluster to join instead of starting one.

    Raises:
        JepaError: What the function raised, with its own class, exit code and remedy.
        PeerLostError: The process that ran the task is gone.
    """
    with local_ray(address=address) as ray:
        # A second try would hide the first failure and double its cost.
        remote = ray.remote(
            num_cpus=needs.num_cpus,
            num_gpus=needs.num_gpus,
            max_retries=0,
            num_returns="streaming",
            name=needs.describe,
        )(_stream)
        try:
            for reference in remote.remote(function, args):
                sent = ray.get(reference)
                if isinstance(sent, _Result):
                    return sent.value
                report(sent)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, JepaError):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            raise lost(needs.describe, str(error)) from error
        raise lost(needs.describe, "it ended without a result")


def _stream(function: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[Any]:
    """Runs in the worker: what the function reports, then its result.

    A callback cannot yield, so the function runs in a thread of its own.
    """
    sent: SimpleQueue[Any] = SimpleQueue()
    done = object()
    with ThreadPoolExecutor(1, thread_name_prefix="task") as pool:
        running = pool.submit(function, *args, report=sent.put)
        running.add_done_callback(lambda _: sent.put(done))
        while (item := sent.get()) is not done:
            yield item
        yield _Result(value=running.result())


def lost(describe: str, reason: str) -> PeerLostError:
    """What to say of a task whose process is gone."""
    first_line = reason.strip().splitlines()[0] if reason.strip() else "no reason was given"
    return PeerLostError(
        f"the Ray task `{describe}` was lost: {first_line}",
        remedy="Look whether the machine ran out of memory, then give the same command again.",
    )
