"""The one place that starts or joins Ray.

Ray runs whatever code reaches its ports, so a cluster of ours listens on the loopback only and
asks for a token; one that is joined has to ask for a token as well. Nothing that was not started
here is ever shut down.
"""

import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from pipeline.errors import JepaError, UsageError

_NAMESPACE = "jepa"
# Tasks hand over paths and small results, never videos; Ray's own default is a third of memory.
_OBJECT_STORE_BYTES = 200 << 20
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A task that asks for no GPU must not hide the GPUs from the code it runs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
}
# Despite its name this decides on Linux, too, whether a loopback address stays one: with Ray's
# default `127.0.0.1` is replaced by the machine's outer address and all ports listen everywhere.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_CONNECT_SECONDS = 10.0
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def local_ray(num_cpus: int | None = None, address: str | None = None) -> Iterator[ModuleType]:
    """Ray for the duration of a `with` block: a private cluster, or the one at `address`.

    Inside a block in the same process the running one is used and left alone.

    Args:
        num_cpus: Tasks of one CPU that run at a time; the machine's cores by default. Has no
            meaning for a cluster that is joined.
        address: `host:port` of a running cluster to join. It must use token authentication.

    Yields:
        The `ray` module.

    Raises:
        UsageError: Ray is not installed, authentication is switched off, or there is no cluster
            at `address`.
    """
    ray = _import_ray(joining=address is not None)
    if ray.is_initialized():
        yield ray
        return
    if address is not None:
        _join(ray, address)
        try:
            yield ray
        finally:
            ray.shutdown()
        return
    # Short on purpose: Ray's sockets lie below it, and a socket's path has at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="jepa-ray-", dir="/tmp")
    try:
        _start(ray, num_cpus, folder)
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _import_ray(*, joining: bool) -> ModuleType:
    """Ray reads these variables when it is imported, so they are set before."""
    if "ray" not in sys.modules:
        for name, value in (_QUIET if joining else _QUIET | _LOOPBACK).items():
            os.environ.setdefault(name, value)
        if not joining and not any(name in os.environ for name in _TOKEN_VARIABLES):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise UsageError(
            "RAY_AUTH_MODE is not `token`: anyone who reaches Ray's ports could run code as you",
            remedy="Unset RAY_AUTH_MODE, or set it to `token`.",
        )
    try:
        import ray  # noqa: PLC0415 - evaluators install without it
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError(
            "this command runs on Ray, which is not installed",
            remedy="pip install 'jepa-pipeline[train]'",
        ) from error
    return ray


def _start(ray: ModuleType, num_cpus: int | None, folder: str) -> None:
    ray.init(
        address="local",
        num_cpus=num_cpus,
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
        raise JepaError(f"Ray listens on {host} instead of the loopback; it was shut down")


def _join(ray: ModuleType, address: str) -> None:
    try:
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
