"""Settings shared by all tests."""

import signal

import pytest
import torch

# Files that take minutes of waiting for processes, the longest first. Files run side by side, each
# whole: one of these that began last would run on alone at the end.
LONGEST = (
    "test_launch_k8s_pods",
    "test_launch_slurm_run",
    "test_engine_run",
    "test_faults_kills",
    "test_conduct_live",
    "test_prep_kills",
    "test_engine_signals",
    "test_launch_slurm_traps",
    "test_engine_saving",
    "test_models_zero3",
    "test_track_prometheus",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and leaves the order inside of each."""
    order = {stem: number for number, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_process() -> None:
    """Small tensors gain nothing from threads, and idle ones slow down processes beside them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_reaches_what_tests_start() -> None:
    """A suite started in the background ignores SIGINT, and so would all processes it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
