"""Every check finds what it is there for, and says what to do about it."""

import http.server
import os
import socket
import threading
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.preflight.checks.batch import compare_batch, ranks_finding
from launch.preflight.checks.clocks import clock_finding, compare_clocks
from launch.preflight.checks.extensions import check_extensions, compare_extensions
from launch.preflight.checks.gpus import compare_gpus
from launch.preflight.checks.lease import check_lease
from launch.preflight.checks.links import compare_network
from launch.preflight.checks.matmul import check_matmul, compare_matmul
from launch.preflight.checks.memory import check_shared_memory
from launch.preflight.checks.mlflow import check_mlflow
from launch.preflight.checks.network import without_device
from launch.preflight.checks.pairs import rounds, spread_out
from launch.preflight.checks.ports import check_ports
from launch.preflight.checks.shards import check_shards
from launch.preflight.checks.space import check_space
from launch.preflight.checks.speed import check_speed, compare_speed
from launch.preflight.checks.versions import check_versions, compare_versions
from launch.preflight.checks.writable import check_writable
from launch.preflight.checks.xid import grave_xids
from launch.preflight.finding import Answer, Finding, Situation, bad_nodes, exit_code
from launch.preflight.merging import merged
from launch.preflight.runner import Runner
from pipeline.environment import read_launch
from pipeline.errors import ExitCode
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions
from pipeline.plan.saving import checkpoint_bytes
from pipeline.track.lease import acquire
from tests.plain import tiny_config
from tests.shards import write_dataset

ALONE = read_launch({})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("preflight") / "data", 6)


def situation(folder: Path, **changes) -> Situation:
    data = {"sources": [{"path": str(folder / "data")}], **changes.pop("data", {})}
    config = tiny_config(runs_folder=str(folder), data=data, **changes)
    return Situation(config=config, launch=ALONE, node="here", ranks_here=1)


def answer(node: str, rank: int, *findings: Finding) -> Answer:
    return Answer(rank=rank, node=node, findings=findings)


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path):
    assert check_writable(situation(tmp_path)).state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_a_fault_of_storage():
    found = check_writable(situation(Path("/proc/nowhere")))
    assert (found.state, found.exit_code) == ("fail", ExitCode.STORAGE)
    assert "/proc" in found.got


def test_write_speed_is_compared_with_what_a_checkpoint_takes(tmp_path):
    here = situation(tmp_path, stop={"grace_seconds": 1e-9})
    measured = check_speed(here)
    found = compare_speed(here, [answer("a", 0, measured), answer("b", 1, measured)])
    assert found.state == "warn"
    assert "stop.grace_seconds" in found.remedy
    slow = replace(measured, values={"mb_per_second": 1e-9})
    hourly = situation(tmp_path)
    assert compare_speed(hourly, [answer("a", 0, slow)]).state == "fail"
    assert compare_speed(hourly, [answer("a", 0, measured)]).state == "ok"


def test_a_checkpoint_has_as_many_bytes_as_its_tensors(tmp_path):
    config = situation(tmp_path).config
    options = BuildOptions(attention=config.attention, checkpoint_activations=False)
    weights = dict(build_objective(config.objective, options).modules().named_parameters())
    teacher = sum(p.numel() for name, p in weights.items() if name.startswith("teacher."))
    student = sum(p.numel() for p in weights.values()) - teacher
    # fp32 weights and two moments of the student, and the teacher's average.
    assert checkpoint_bytes(config) == 4 * (3 * student + teacher)


def test_space_for_all_checkpoints_is_asked_for(tmp_path):
    assert check_space(situation(tmp_path)).state == "ok"
    many = check_space(situation(tmp_path, checkpoint={"every_steps": 1, "keep_last": 10**9}))
    assert many.state == "warn"
    wide = {"size": "vit_tiny", "width": 96_000, "depth": 40, "heads": 1000, "patch_size": 8}
    objective = {"kind": "jepa", "encoder": wide, "predictor": {"width": 24, "heads": 2}}
    huge = check_space(situation(tmp_path, objective=objective))
    assert (huge.state, huge.exit_code) == ("fail", ExitCode.STORAGE)


def test_whole_shards_are_read_to_the_end(dataset):
    found = check_shards(situation(dataset.parent))
    assert found.state == "ok"
    assert "2 read to the end" in found.got


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    shard = write_dataset(tmp_path / "data", 4) / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    if damage == "flip":
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-512])
    else:
        shard.unlink()
    found = check_shards(situation(tmp_path))
    assert (found.state, found.exit_code) == ("fail", ExitCode.CONFIG)
    assert "shard-000001.tar" in found.got
    tolerant = check_shards(situation(tmp_path, data={"on_damaged_shard": "quarantine"}))
    assert tolerant.state == "warn"


def test_a_missing_dataset_is_a_wrong_configuration(tmp_path):
    found = check_shards(situation(tmp_path))
    assert (found.state, found.exit_code) == ("fail", ExitCode.CONFIG)


def test_a_run_that_another_job_owns_is_told(tmp_path):
    here = situation(tmp_path)
    assert check_lease(here).state == "ok"
    here.config.run_dir.mkdir()
    lease = acquire(here.config.run_dir)
    found = check_lease(here)
    assert found.state == "fail"
    assert f"process {os.getpid()}" in found.got
    lease.release()
    assert check_lease(here).state == "ok"


def test_locks_of_dead_compilations_are_removed_and_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / "py311_cpu" / name / "lock" for name in ("dead", "alive", "young")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    for lock in locks[:2]:
        os.utime(lock, (time.time() - 60,) * 2)
        os.utime(lock.parent, (time.time() - 60,) * 2)
    here = situation(tmp_path)
    with locks[1].open():
        found = compare_extensions(here, [answer("here", 0, check_extensions(here))])
    assert [lock.exists() for lock in locks] == [False, True, True]
    assert found.state == "warn"  # of the young one nobody knows yet
    assert f"removed {locks[0]}" in found.got


def test_a_lock_that_another_node_holds_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    os.utime(lock.parent, (0, 0))
    here = situation(tmp_path)
    own = check_extensions(here)
    other = replace(own, values={"locks": [str(lock)], "held": [str(lock)]})
    assert compare_extensions(here, [answer("a", 0, own), answer("b", 1, other)]).state == "ok"
    assert lock.exists()
    compare_extensions(here, [answer("a", 0, own), answer("b", 1, own)])
    assert not lock.exists()


def test_shared_memory_must_hold_what_workers_keep_ready(tmp_path):
    assert check_shared_memory(situation(tmp_path)).state == "ok"
    found = check_shared_memory(situation(tmp_path, data={"workers": 10_000_000}))
    assert found.state == "fail"
    assert "data.workers" in found.remedy


def test_a_taken_metrics_port_is_told(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        track = {"prometheus": {"enabled": True, "port": other.getsockname()[1]}}
        assert check_ports(situation(tmp_path, track=track)).state == "warn"
    assert check_ports(situation(tmp_path, track=track)).state == "ok"


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (403, "ok"), (500, "warn")])
def test_an_mlflow_server_is_asked(tmp_path, status, state):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_words):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    track = {"mlflow": {"tracking_uri": uri}}
    assert check_mlflow(situation(tmp_path, track=track)).state == state
    server.shutdown()
    server.server_close()
    assert check_mlflow(situation(tmp_path, track=track)).state == "warn"


def test_a_damaged_mlflow_database_is_told(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 100)
    found = check_mlflow(situation(tmp_path, track={"mlflow": {"enabled": True}}))
    assert found.state == "warn"
    assert "mlflow.db" in found.got


def test_grave_gpu_errors_of_the_last_day_are_found_in_the_kernels_log():
    day = 86_400
    records = [
        f"4,1,{(2 * day - 100) * 10**6},-;NVRM: Xid (PCI:0000:4e:00): 79, pid=1, GPU has fallen",
        f"4,2,{(2 * day - 90) * 10**6},-;NVRM: Xid (PCI:0000:4e:00): 13, pid=7, of a program",
        f"4,3,{100 * 10**6},-;NVRM: Xid (PCI:0000:10:00): 48, too long ago",
        "6,4,17,-;usb 1-1: new device",
        "torn",
    ]
    assert grave_xids(records, 2 * day) == ["79 of PCI:0000:4e:00"]


def test_a_node_with_fewer_gpus_is_to_blame(tmp_path):
    def seen(node, rank, count):
        names = [f"{node}/{number}" for number in range(count)]
        return answer(node, rank, Finding(name="gpus", state="ok", values={"visible": names}))

    answers = [seen("a", 0, 8), seen("b", 1, 8), seen("c", 2, 7)]
    found = compare_gpus(situation(tmp_path), answers)
    assert (found.state, found.nodes) == ("fail", ("c",))
    wanted = replace(situation(tmp_path), wanted_gpus=9)
    assert compare_gpus(wanted, answers).nodes == ("a", "b", "c")
    nowhere = [seen("a", 0, 0), seen("b", 1, 0)]
    assert compare_gpus(replace(wanted, wanted_gpus=2), nowhere).state == "skip"


def test_gpus_that_processes_see_one_by_one_are_added_up(tmp_path):
    answers = [
        answer("a", rank, Finding(name="gpus", state="ok", values={"visible": [f"GPU-{rank}"]}))
        for rank in range(4)
    ]
    four = replace(situation(tmp_path), wanted_gpus=4)
    assert compare_gpus(four, answers).state == "ok"
    # The same one twice is one.
    assert compare_gpus(four, [*answers[:3], answers[2]]).nodes == ("a",)


def test_a_device_slower_than_the_others_median_is_to_blame(tmp_path):
    here = situation(tmp_path)
    measured = check_matmul(here)
    assert measured.values["CPU"] > 0
    rates = [700.0, 710.0, 705.0, 400.0]
    answers = [
        answer(node, rank, replace(measured, values={"GPU 0": rate}))
        for rank, (node, rate) in enumerate(zip("abcd", rates, strict=True))
    ]
    found = compare_matmul(here, answers)
    assert (found.state, found.nodes, found.exit_code) == ("fail", ("d",), ExitCode.PEER_LOST)
    assert compare_matmul(here, answers[:3]).state == "ok"


def test_nodes_with_other_versions_are_named(tmp_path):
    here = situation(tmp_path)
    own = check_versions(here)
    assert own.state == "ok"
    other = replace(own, values={**own.values, "torch": "2.12.0"})
    answers = [answer("a", 0, own), answer("b", 1, own), answer("c", 2, other)]
    found = compare_versions(here, answers)
    assert (found.state, found.nodes, found.exit_code) == ("fail", ("c",), ExitCode.CONFIG)
    assert f"c has torch 2.12.0 instead of {own.values['torch']}" in found.got


@pytest.mark.parametrize(("offset", "state"), [(0.2, "ok"), (-7.0, "warn"), (3600.0, "fail")])
def test_clocks_that_differ_are_named(tmp_path, offset, state):
    answers = [answer("a", 0, clock_finding(0.0)), answer("b", 1, clock_finding(offset))]
    found = compare_clocks(situation(tmp_path), answers)
    assert found.state == state
    assert found.nodes == (() if state == "ok" else ("b",))


def test_ranks_that_cannot_share_the_batch_are_refused_with_those_that_can(tmp_path):
    nodes = [replace(situation(tmp_path), node=name, ranks_here=3) for name in "ab"]
    answers = [answer(one.node, rank, ranks_finding(one)) for rank, one in enumerate(nodes)]
    found = compare_batch(nodes[0], answers)
    assert (found.state, found.exit_code) == ("fail", ExitCode.CONFIG)
    assert "6 rank(s)" in found.expected


@given(st.integers(2, 33))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(num):
    schedule = rounds(num)
    assert len(schedule) == num - 1 + num % 2
    for pairs in schedule:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players)) == num - num % 2
    met = [pair for pairs in schedule for pair in pairs]
    assert len(met) == len(set(met)) == num * (num - 1) // 2


def test_a_thousand_nodes_take_a_bounded_number_of_rounds():
    taken = spread_out(rounds(1024), 24)
    assert len(taken) == 24
    assert all(len(pairs) == 512 for pairs in taken)


def network(pairs: list, **changes) -> Finding:
    values = {"pairs": pairs, "all_reduce": 10.0, "all_gather": 10.0, **changes}
    return Finding(name="network", state="ok", values=values, exit_code=ExitCode.PEER_LOST)


def all_pairs(slow: dict) -> list:
    pairs = [pair for round_pairs in rounds(4) for pair in round_pairs]
    return [["abcd"[i], "abcd"[j], slow.get(("abcd"[i], "abcd"[j]), 12.0)] for i, j in pairs]


def test_a_slow_pair_is_named_and_a_slow_machine_is_to_blame(tmp_path):
    here = situation(tmp_path)
    one = compare_network(here, [answer("a", 0, network(all_pairs({("a", "c"): 2.0})))])
    assert (one.state, one.nodes) == ("warn", ())
    assert "a and c 2.00" in one.got
    slow = {(a, "c"): 2.0 for a in "ab"} | {("c", "d"): 2.0}
    whole = compare_network(here, [answer("a", 0, network(all_pairs(slow)))])
    assert (whole.state, whole.nodes) == ("fail", ("c",))
    assert compare_network(here, [answer("a", 0, network(all_pairs({})))]).state == "ok"


def test_of_many_silent_exchanges_the_first_is_told(tmp_path):
    def silent(node, rank, partner, number):
        values = {"self": node, "partner": partner, "round": number}
        return answer(node, rank, replace(network([]), state="fail", values=values))

    # c and d do not reach each other in round 1; a and b wait for them in round 2.
    answers = [silent("a", 0, "c", 2), silent("b", 1, "d", 2)]
    answers += [silent("c", 2, "d", 1), silent("d", 3, "c", 1)]
    found = compare_network(situation(tmp_path), answers)
    assert found.state == "fail"
    assert found.got == "no answer between c and d"
    assert found.nodes == ("c", "d")


def test_of_ranks_on_one_machine_it_is_the_machine_that_is_told_to_the_scheduler(tmp_path):
    here, ranks = situation(tmp_path), [f"rank {number}" for number in range(4)]
    rates = [[a, b, 2.0 if "rank 2" in (a, b) else 12.0] for a, b in combinations(ranks, 2)]
    answers = [answer("a", 0, network(rates))] + [
        answer("a", rank, network([])) for rank in range(1, 4)
    ]
    slow = compare_network(here, answers)
    assert (slow.state, slow.nodes) == ("fail", ("a",))
    assert "rank 0 and rank 2 2.00" in slow.got
    values = {"self": "rank 1", "partner": "rank 3", "round": 0}
    stuck = compare_network(
        here, [answer("a", 1, replace(network([]), state="fail", values=values)), *answers[2:]]
    )
    assert (stuck.got, stuck.nodes) == ("no answer between rank 1 and rank 3", ("a",))


def test_ranks_without_a_gpu_beside_ranks_with_one_are_named():
    kinds = {0: "cuda", 1: "cuda", 2: "cuda", 3: "cpu"}
    found = without_device(kinds, {0: "a", 1: "a", 2: "b", 3: "b"})
    assert (found.state, found.nodes) == ("fail", ("b",))
    assert "3 on b" in found.got
    # With the same lack everywhere no machine is worse than another.
    both = without_device({**kinds, 1: "cpu"}, {0: "a", 1: "a", 2: "b", 3: "b"})
    assert both.nodes == ()


def test_what_only_some_nodes_suffer_from_is_their_fault():
    fine = Finding(name="space", state="ok", exit_code=ExitCode.STORAGE)
    full = replace(fine, state="fail", got="nothing free", remedy="Free it.")
    some = merged("space", [answer("a", 0, fine), answer("b", 1, full)])
    assert (some.exit_code, some.nodes) == (ExitCode.PEER_LOST, ("b",))
    everyone = merged("space", [answer("a", 0, full), answer("b", 1, full)])
    assert (everyone.exit_code, everyone.nodes) == (ExitCode.STORAGE, ())
    assert bad_nodes([some, everyone]) == ["b"]


def test_what_no_retry_mends_decides_the_exit_code():
    config, storage, peer = (
        Finding(name="x", state="fail", exit_code=code)
        for code in (ExitCode.CONFIG, ExitCode.STORAGE, ExitCode.PEER_LOST)
    )
    assert exit_code([storage, peer, config]) == ExitCode.CONFIG
    assert exit_code([storage, peer]) == ExitCode.PEER_LOST
    assert exit_code([storage, replace(peer, state="warn")]) == ExitCode.STORAGE
    assert exit_code([replace(config, state="warn")]) == ExitCode.DONE


def test_a_check_that_never_ends_is_told_with_what_it_was_at():
    runner = Runner(time.monotonic() + 60, "here")
    never = threading.Event()

    def check() -> Finding:
        runner.at = "a dead file server"
        never.wait()
        return Finding(name="x", state="ok")

    found = runner.run("x", check, limit_seconds=0.2, exit_code=ExitCode.STORAGE)
    assert (found.state, found.exit_code) == ("fail", ExitCode.STORAGE)
    assert "no answer of a dead file server" in found.got
    assert runner.is_stuck
    never.set()


def test_a_check_that_breaks_is_told_and_does_not_break_the_others():
    def check() -> Finding:
        raise OSError(5, "Input/output error")

    found = Runner(time.monotonic() + 60, "here").run("x", check, limit_seconds=5)
    assert found.state == "fail"
    assert "Input/output error" in found.got
    # Storage that no machine reaches excludes no machine.
    runner = Runner(time.monotonic() + 60, "here")
    shared = runner.run("x", check, limit_seconds=5, exit_code=ExitCode.STORAGE)
    assert bad_nodes([merged("x", [answer("a", 0, shared), answer("b", 1, shared)])]) == []


def test_findings_survive_their_way_through_json():
    found = Finding(
        name="x", state="warn", nodes=("a",), exit_code=ExitCode.STORAGE, values={"k": [1.5]}
    )
    assert Finding.from_dict(found.to_dict()) == found
