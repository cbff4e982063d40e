"""A real server of the S3 protocol on loopback, named by the environment as a cloud's would be."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_server() -> Iterator[None]:
    """Serves while it stands; s3fs finds address and keys in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # s3fs keeps a file system, with the address it had then, for the rest of the process.
    file_system = fsspec.get_filesystem_class("s3")
    file_system.clear_instance_cache()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "no-secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield
    finally:
        file_system.clear_instance_cache()
        server.stop()
