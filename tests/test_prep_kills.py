"""Killed workers, killed drivers, full disks: what is done stays done, the bytes are the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import driver
from data_prep.item import ItemDone, ItemJob, prepare_item
from data_prep.prepare import PrepReport
from data_prep.settings import PrepSettings
from pipeline.cluster import local_ray
from pipeline.data.format import ShardIndex
from pipeline.errors import StorageError, UsageError
from tests.prep import markers, run_prep, visible_files
from tests.test_decode_frames import VIDEOS, grid_video

SETTINGS = PrepSettings(short_side=64, samples_per_shard=4, max_seconds=4.0, duplicates="keep")
FLAGS = "--short-side 64 --samples-per-shard 4 --max-seconds 4 --duplicates keep --workers 1"
SLOW = "v3_slow.mp4"


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """Starting Ray takes seconds, so the preparations of this process share one."""
    with local_ray(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sources, one of them bad; four take about a second each."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(5):
        (folder / f"v{number}.mp4").write_bytes(grid_video(num_frames=16 + number))
    for name in (SLOW, "v0_slow.mp4", "v5_slow.mp4", "v6_slow.mp4"):
        shutil.copy(VIDEOS / "screen_1080p.mp4", folder / name)
    (folder / "v1_empty.mp4").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "dataset"
    run_prep(sources, out=out, settings=SETTINGS)
    return out


class Killer(threading.Thread):
    """Kills the process that is at a certain source, the first `times` times that it gets there."""

    def __init__(self, marker: Path, times: int) -> None:
        super().__init__(daemon=True)
        self.marker, self.times = marker, times
        self.killed: list[int] = []
        self.done = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.times and not self.done.wait(0.005):
            try:
                pid = int(self.marker.read_text() or "0")
            except FileNotFoundError:
                continue
            if pid and pid not in self.killed:
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)


def prepare_under_fire(sources: Path, out: Path, times: int) -> PrepReport:
    killer = Killer(markers(out, sources, SETTINGS)[SLOW], times)
    killer.start()
    report = run_prep(sources, out=out, settings=SETTINGS)
    killer.done.set()
    killer.join()
    assert len(killer.killed) == times
    return report


def test_a_worker_killed_once_costs_nothing_but_time(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    report = prepare_under_fire(sources, tmp_path / "dataset", times=1)
    assert "decoder killed" not in report.rejected
    assert visible_files(tmp_path / "dataset") == visible_files(undisturbed)


def test_a_source_that_kills_its_worker_twice_is_left_out_and_named(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"
    report = prepare_under_fire(sources, out, times=2)
    assert report.rejected["decoder killed"] == 1
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").open()]
    killed = [line for line in rejected if line["reason"] == "decoder killed"]
    assert [(line["source"], line["kept_samples"]) for line in killed] == [(SLOW, 0)]

    def videos(dataset: Path) -> dict[str, bytes]:
        index = ShardIndex.open(dataset)
        records = [index.record(number) for number in range(len(index))]
        return {record.key: index.read_member(record) for record in records}

    kept = {key: video for key, video in videos(undisturbed).items() if "v3_slow" not in key}
    assert videos(out) == kept
    assert len(kept) < len(videos(undisturbed))


def dying_before_it_begins(job: ItemJob) -> ItemDone:
    """Ends its process as for want of memory: twice for one source, once for another."""
    deaths = {"v0.mp4": 2, "v4.mp4": 1}.get(job.source.name, 0)
    for number in range(deaths):
        note = Path(f"{job.marker}.died{number}")
        if not note.exists():
            note.parent.mkdir(exist_ok=True)
            note.touch()
            os._exit(1)
    return prepare_item(job)


def test_deaths_that_no_source_is_to_blame_for_end_nothing_while_others_are_done(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "prepare_item", dying_before_it_begins)
    videos = [sources / f"v{number}.mp4" for number in range(5)]
    report = run_prep(*videos, out=tmp_path / "out", settings=SETTINGS)
    assert (report.rejected, report.num_samples) == ({}, 5)


def start_command(sources: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.cli", "prep", "run", str(sources), "--out", str(out)]
    return subprocess.Popen(
        [*command, *FLAGS.split()],
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def finished_items(out: Path) -> set[str]:
    return {path.stem for path in (out / ".prep" / "items").glob("*/*.tar")}


def stop_after(sources: Path, out: Path, num_items: int, sent: signal.Signals) -> tuple[int, str]:
    """Runs the command until so many more items are done, and sends it a signal then."""
    process = start_command(sources, out)
    try:
        # By then it handles signals, and workers that a killed driver left have ended.
        assert process.stderr is not None
        assert "a folder of videos" in process.stderr.readline()
        num_items += len(finished_items(out))
        deadline = time.monotonic() + 200
        while len(finished_items(out)) < num_items and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # To the whole group, as a terminal or Slurm does.
        os.killpg(process.pid, sent)
        _, errors = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def test_a_driver_killed_again_and_again_repeats_nothing_and_ends_with_the_same_bytes(
    undisturbed: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, log = tmp_path / "dataset", tmp_path / "done_again"
    code, _ = stop_after(sources, out, 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, errors = stop_after(sources, out, 1, signal.SIGTERM)
    assert (code, "the same command continues" in errors) == (75, True), errors
    code, errors = stop_after(sources, out, 1, signal.SIGINT)
    assert (code, "the same command continues" in errors) == (130, True), errors
    assert not (out / "manifest.json").exists()
    there = finished_items(out)
    assert 4 <= len(there) < 10
    log.touch()

    def noted(job: ItemJob) -> ItemDone:
        with log.open("a") as file:
            file.write(f"{job.item}\n")
        return prepare_item(job)

    monkeypatch.setattr(driver, "prepare_item", noted)
    run_prep(sources, out=out, settings=SETTINGS)
    again = set(log.read_text().split())
    assert not again & there
    assert len(again | there) == 10
    assert visible_files(out) == visible_files(undisturbed)
    assert not list(out.rglob("*.partial*"))


def test_two_drivers_never_work_on_one_dataset(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    process = start_command(sources, out)
    try:
        deadline = time.monotonic() + 200
        while not (out / ".prep" / "running").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="another `jepa prep run` is at work"):
                run_prep(sources, out=out, settings=SETTINGS, overwrite=overwrite)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("may not mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave_free(disk: Path, num_bytes: int) -> None:
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    ballast.write_bytes(b"x" * max(0, shutil.disk_usage(disk).free - num_bytes))


def test_a_full_disk_is_named_and_when_there_is_room_the_same_command_goes_on(
    undisturbed: Path, sources: Path, small_disk: Path
) -> None:
    out = small_disk / "dataset"
    # Twice in a row, at different places.
    for free in (170 << 10, 30 << 10):
        leave_free(small_disk, free)
        with pytest.raises(StorageError, match=r"No space left|disk is full") as full:
            run_prep(sources, out=out, settings=SETTINGS)
        assert "run the same command" in full.value.remedy
        assert not (out / "manifest.json").exists()
    (small_disk / "ballast").unlink()
    run_prep(sources, out=out, settings=SETTINGS)
    assert visible_files(out) == visible_files(undisturbed)
