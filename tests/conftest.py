"""Settings shared by all tests."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_process() -> None:
    """Small tensors gain nothing from threads, and idle ones slow down processes beside them."""
    torch.set_num_threads(1)
