"""One owner at a time: races, takeovers, and owners that wake up too late."""

import json
import multiprocessing
import os
import shutil
import time

import pytest

from pipeline.errors import ExitCode
from pipeline.track.lease import OwnerError, RunGoneError, acquire, look
from pipeline.track.owner import this_process

ROUNDS = 200


def race(folder, ready, results):
    for number in range(ROUNDS):
        run = folder / str(number)
        ready.wait()
        try:
            token = acquire(run).token
        except OwnerError:
            token = 0
        results.put((number, os.getpid(), token))


def test_of_two_processes_that_want_a_run_exactly_one_gets_it_200_times(tmp_path):
    for number in range(ROUNDS):
        run = tmp_path / str(number)
        (run / "lease").mkdir(parents=True)
        if number % 2:  # a dead owner's lease is raced for as well
            write_lease(run, 7, process=this_process().process + "0")
    # Not forked: this process has threads of other tests, whose locks nobody would open there.
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=race, args=(tmp_path, ready, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    told = [results.get(timeout=200) for _ in range(2 * ROUNDS)]
    for racer in racers:
        racer.join(timeout=60)
    for number in range(ROUNDS):
        winners = [token for round_, _, token in told if round_ == number and token]
        assert winners == [8 if number % 2 else 1]


def write_lease(run, token, *, age=0.0, **changes):
    (run / "lease").mkdir(parents=True, exist_ok=True)
    me = this_process()
    record = {"host": me.host, "pid": me.pid, "process": me.process, **changes}
    path = run / "lease" / f"{token:08d}.json"
    path.write_text(json.dumps(record))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_living_owner_is_named_with_host_process_job_and_age(tmp_path, monkeypatch):
    write_lease(tmp_path, 3, host="gpu017", pid=4711, process="other/boot/1", job="99")
    path = tmp_path / "lease" / "00000003.json"

    monkeypatch.setattr("pipeline.track.lease.time.sleep", lambda _seconds: os.utime(path))
    with pytest.raises(OwnerError) as caught:
        acquire(tmp_path)
    assert "process 4711 on gpu017, job 99" in str(caught.value)
    assert "its last sign of life was 0 s ago" in str(caught.value)


@pytest.fixture
def no_waiting(monkeypatch):
    """Whoever waits before a lease is taken or refused fails the test."""

    def wait(_seconds):
        pytest.fail("it waited")

    monkeypatch.setattr("pipeline.track.lease.time.sleep", wait)


@pytest.mark.usefixtures("no_waiting")
def test_a_living_owner_on_this_machine_is_refused_at_once(tmp_path):
    acquire(tmp_path)
    with pytest.raises(OwnerError, match=f"process {os.getpid()} on "):
        acquire(tmp_path)


def test_an_owner_of_another_machine_is_waited_for_until_it_is_stale(tmp_path):
    write_lease(tmp_path, 3, host="gpu017", process="other/boot/1", age=0.5)
    begin = time.monotonic()
    assert acquire(tmp_path, stale_seconds=2.0).token == 4
    assert time.monotonic() - begin > 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"process": "{mark}0"},  # the number of a process that is gone, taken by another
        {"released": True},
        {"host": "gpu017", "process": "x/y/z", "job": "{job}", "launcher_attempt": "0"},
    ],
)
@pytest.mark.usefixtures("no_waiting")
def test_a_dead_released_or_requeued_owner_is_replaced_at_once(tmp_path, monkeypatch, changes):
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    words = {"{mark}0": this_process().process + "0", "{job}": "31"}
    write_lease(tmp_path, 3, **{k: words.get(v, v) for k, v in changes.items()})
    assert acquire(tmp_path).token == 4


def test_an_owner_that_was_paused_while_another_took_over_is_fenced_off(tmp_path):
    first = acquire(tmp_path)
    first.check()
    path = tmp_path / "lease" / f"{first.token:08d}.json"
    os.utime(path, (time.time() - 100, time.time() - 100))  # paused: no sign for long
    second = acquire(tmp_path)
    assert second.token == first.token + 1
    with pytest.raises(OwnerError, match="was taken over by process"):
        first.check()
    first.release()  # its last deed must not free the run for a third
    second.check()
    held = look(tmp_path)
    assert held is not None
    assert held.token == second.token
    assert held.owner is not None
    assert not held.owner.released


def check_for(seconds, lease):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lease.check()
        time.sleep(0.02)


def test_a_run_whose_folder_is_gone_or_begun_anew_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.track.lease._TOUCH_SECONDS", 0.05)
    run = tmp_path / "run"
    run.mkdir()
    first = acquire(run)
    first.keep_alive()
    shutil.rmtree(run)
    with pytest.raises(RunGoneError, match="was removed or renamed under this job") as told:
        first.check()
    assert told.value.exit_code == ExitCode.STORAGE
    # Somebody starts it again at once: the number is the same, the owner is not.
    path = write_lease(run, first.token, process="other/boot/1", host="gpu017", pid=4711)
    with pytest.raises(OwnerError, match="was taken over by process 4711 on gpu017"):
        check_for(30, first)
    first.release()
    assert json.loads(path.read_text())["pid"] == 4711


def test_a_number_is_never_used_twice_however_late_a_taker_wakes_up(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.track.lease.STALE_SECONDS", 30.0)
    tokens = []
    for _ in range(20):
        lease = acquire(tmp_path)
        tokens.append(lease.token)
        lease.release()
    assert tokens == list(range(1, 21))
    assert [path.name for path in (tmp_path / "lease").glob("0*.json")] == ["00000020.json"]
