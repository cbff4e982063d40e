"""Worker processes: what they ignore, how they die, and that none is left behind."""

import multiprocessing.forkserver
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipeline.data.casualties import worker_died
from pipeline.data.loader import Loader, make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.data.worker import cause_of_death
from pipeline.errors import DataError
from pipeline.masks.collate import collate_plan
from tests.shards import make_plans, write_dataset

NUM_MICRO_BATCHES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shards") / "set", 6)


def start(folder: Path, collate=collate_plan, **settings) -> Loader:
    settings = {"workers": 2, "prefetch": 1, **settings}
    config = DataConfig(sources=(Source(path=str(folder)),), **settings)
    return make_loader(config, plans=make_plans(), collate=partial(collate, seed=4), seed=4)


def wait_until_gone(gone: list[int], seconds: float = 60.0) -> list[int]:
    deadline = time.monotonic() + seconds
    left = gone
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [pid for pid in left if psutil.pid_exists(pid) and not is_zombie(pid)]
    return left


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_workers_and_their_server_leave_signals_to_the_training_process(folder):
    with start(folder) as loader:
        next(loader)
        server = multiprocessing.forkserver._forkserver._forkserver_pid
        for pid in [*loader.pids, server]:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
        assert len(list(loader)) == NUM_MICRO_BATCHES - 1
        assert psutil.pid_exists(server)


def test_the_training_process_still_gets_its_signals_after_starting_workers(folder):
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(True))
    try:
        with start(folder):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_close_ends_the_workers_in_the_middle_of_a_run(folder):
    loader = start(folder)
    next(loader)
    running = loader.pids
    assert all(psutil.pid_exists(pid) for pid in running)
    loader.close()
    assert not wait_until_gone(running)
    assert next(loader, None) is None
    loader.close()


def test_close_ends_a_worker_that_hangs(folder, monkeypatch):
    monkeypatch.setattr("pipeline.data.crew._CLOSE_SECONDS", 0.5)
    loader = start(folder)
    next(loader)
    running = loader.pids
    os.kill(running[0], signal.SIGSTOP)
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 60
    assert not wait_until_gone(running)


def test_a_run_that_tolerates_no_dead_worker_ends_with_the_cause_and_what_to_do(folder):
    with start(folder, max_worker_deaths=0) as loader:
        next(loader)
        os.kill(loader.pids[0], signal.SIGKILL)
        with pytest.raises(DataError, match=r"SIGKILL.*ran out of memory") as caught:
            list(loader)
    # The video it was at is named: it may be the one that took the memory.
    where = r"at (no clip|clip-0000\d in .*/shard-00000\d.tar \(position \d+\))"
    assert re.search(where, str(caught.value))
    assert "fewer data.workers" in caught.value.remedy


def refuse(clips, plan, seed):
    raise ZeroDivisionError("a fault of our own")


def test_a_fault_of_our_own_in_a_worker_is_not_taken_for_bad_data(folder):
    loader = start(folder, collate=refuse, workers=1)
    with loader, pytest.raises(ZeroDivisionError, match="a fault of our own"):
        next(loader)


def test_waiting_is_measured(folder):
    def slow(clips, plan, seed):
        time.sleep(0.2)
        return collate_plan(clips, plan, seed)

    with start(folder, collate=slow, workers=0) as loader:
        next(loader)
        assert 0.2 <= loader.wait_seconds < 5.0


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (-signal.SIGKILL, "out of memory"),
        (-signal.SIGBUS, "shared memory"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (1, "exit code 1"),
    ],
)
def test_exit_codes_are_put_into_words(exit_code, words):
    assert words in cause_of_death(exit_code)


def test_a_crash_is_not_taken_for_lack_of_memory():
    crash = worker_died([(-signal.SIGSEGV, "clip-00001 in s.tar (position 5)")])
    assert "clip-00001" in str(crash)
    assert "without this video" in crash.remedy
    assert "/dev/shm" in worker_died([(-signal.SIGBUS, "its first sample")]).remedy  # noqa: S108


def run(folder: Path, ending: str) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-m", "tests.workers.loader_run", str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, ending], stdout=pipe, stderr=pipe, text=True, cwd=root)


def test_hanging_workers_say_where_and_killed_trainers_leave_no_workers_behind(folder):
    with run(folder, "kill") as process:
        assert "A loader worker died" in process.stdout.readline()
        left = [int(pid) for pid in process.stdout.readline().split()]
        assert len(left) == 3
        process.kill()
        # Open until the last process that inherited it has ended.
        assert "in collate_or_hang" in process.stderr.read()
    assert not wait_until_gone(left)


def test_a_process_that_forgets_to_close_its_loader_still_ends(folder):
    with run(folder, "forget") as process:
        left = [int(pid) for pid in process.stdout.readline().split()]
        assert process.wait(timeout=60) == 0
    assert not wait_until_gone(left)
