"""The one place that starts or joins Ray.

Ray runs whatever code reaches its ports, so a cluster of ours listens on the loopback only and
asks for a token; one that is joined has to ask for a token as well. Nothing that was not started
here is ever shut down.
"""

import fcntl
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from pipeline.errors import JepaError, UsageError

_NAMESPACE = "jepa"
# Tasks hand over paths and small results, never videos; Ray's own default is a third of memory.
_OBJECT_STORE_BYTES = 200 << 20
_CONNECT_SECONDS = 10.0
# Short on purpose: Ray's sockets lie below it, and a socket's path has at most 107 bytes.
_TEMPORARY = Path("/tmp")  # noqa: S108 - what lies in it is made by mkdtemp
_PREFIX, _LOCK = "jepa-ray-", "driver.lock"
# Until then a folder may be one whose process has not locked it yet, or whose Ray is still ending.
_SETTLED_SECONDS = 60.0
_VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A task that asks for no GPU must not hide the GPUs from the code it runs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_LOCAL_VARIABLES = {
    # Despite its name this decides on Linux, too, whether a loopback address stays one: with
    # Ray's default 127.0.0.1 becomes the machine's outer address, and every port listens there.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# One for the life of the process: Ray reads it once and keeps it.
_TOKEN = secrets.token_hex(32)
_imported_here: list[bool] = []


@contextmanager
def local_ray(
    num_cpus: float | None = None,
    address: str | None = None,
    *,
    num_gpus: float | None = None,
) -> Iterator[ModuleType]:
    """Ray for the duration of a `with` block: a private cluster, or the one at `address`.

    Inside a block in the same process the running one is used and left alone.

    Args:
        num_cpus: Tasks of one CPU that run at a time; the machine's cores by default. Has no
            meaning for a cluster that is joined.
        address: `host:port` of a running cluster to join, or `auto` for the one that this process
            was started in. It must use token authentication.
        num_gpus: GPUs that tasks may ask for; the machine's by default. As num_cpus.

    Yields:
        The `ray` module.

    Raises:
        UsageError: Ray is not installed, authentication is switched off, or there is no cluster
            at `address`.
    """
    with _environment(joining=address is not None):
        ray = _import_ray()
        if ray.is_initialized():
            yield ray
        elif address is not None:
            with _joined(ray, address):
                yield ray
        else:
            with _started(ray, num_cpus, num_gpus):
                yield ray


def confine_worker(*, nice: int, hide_gpus: bool) -> None:
    """Makes the calling thread of a worker, and the threads it starts, give way to others.

    Args:
        nice: Priority as `nice` counts; 19 takes only time that nobody else wants.
        hide_gpus: Show no GPU: those of this machine belong to somebody else.
    """
    # Of a thread, on Linux: a worker's own threads go on listening to Ray.
    if nice > os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    if hide_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def _environment(*, joining: bool) -> Iterator[None]:
    """Sets what Ray and the processes it starts read from the environment, for the time being."""
    wanted = dict(_VARIABLES) if joining else _VARIABLES | _LOCAL_VARIABLES
    if not joining and not any(name in os.environ for name in _TOKEN_VARIABLES):
        wanted["RAY_AUTH_TOKEN"] = _TOKEN
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        if os.environ["RAY_AUTH_MODE"] != "token":
            raise UsageError(
                "RAY_AUTH_MODE is not `token`: whoever reaches Ray's ports could run code as you",
                remedy="Unset RAY_AUTH_MODE, or set it to `token`.",
            )
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _import_ray() -> ModuleType:
    """Ray decides while it is imported whether it asks for tokens and where it listens."""
    early = sys.modules.get("ray") if not _imported_here else None
    if early is not None and not early.is_initialized():
        raise JepaError("ray was imported before pipeline.cluster, which has to confine it first")
    try:
        import ray  # noqa: PLC0415 - evaluators install without it
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError(
            "this command runs on Ray, which is not installed",
            remedy="pip install 'jepa-pipeline[train]'",
        ) from error
    _imported_here.append(True)
    return ray


@contextmanager
def _started(ray: ModuleType, num_cpus: float | None, num_gpus: float | None) -> Iterator[None]:
    with _own_folder() as folder:
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                namespace=_NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            host = ray.get_runtime_context().gcs_address.rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost", "[::1]"):
                raise JepaError(f"Ray listened on {host} instead of the loopback and was shut down")
            yield
        finally:
            ray.shutdown()


@contextmanager
def _own_folder() -> Iterator[str]:
    """A folder for Ray's files; those that killed processes of this user left go with it."""
    for left in _TEMPORARY.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # somebody else's, or gone
            _remove_if_left(left)
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=_TEMPORARY)
    with (Path(folder) / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    about = folder.lstat()
    if about.st_uid != os.getuid() or time.time() - about.st_mtime < _SETTLED_SECONDS:
        return
    with (folder / _LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _joined(ray: ModuleType, address: str) -> Iterator[None]:
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            # Ray itself waits many minutes for a head that is not there.
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UsageError(
            f"no Ray cluster could be joined at {address}: {first_line}",
            remedy="Start it with token authentication and give this process the token by "
            "RAY_AUTH_TOKEN_PATH; or leave the address out to run on this machine.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
