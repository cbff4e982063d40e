"""Settings shared by all tests."""

import signal

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_process() -> None:
    """Small tensors gain nothing from threads, and idle ones slow down processes beside them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_reaches_what_tests_start() -> None:
    """A suite started in the background ignores SIGINT, and so would all processes it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
