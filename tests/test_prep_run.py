"""The whole preparation under Ray: interrupted, killed and repeated, its bytes stay the same."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import driver
from data_prep.driver import Workers
from data_prep.ledger import Ledger
from data_prep.part import PartJob, PartReport, prepare_part
from data_prep.prepare import PrepReport, prepare
from data_prep.settings import PrepSettings
from pipeline.cluster import local_ray
from pipeline.data.decode import DecodeLimits, decode_frames
from pipeline.data.format import ShardIndex
from pipeline.errors import DataError, UsageError
from tests.test_decode_frames import VIDEOS, grid_video

SETTINGS = PrepSettings(short_side=64, videos_per_shard=3, max_seconds=4.0)
NUM_PARTS = 4


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """Starting Ray takes seconds, so the preparations of this file share one."""
    with local_ray(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve sources, two of them bad; the eighth takes about a second on its own."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(9):
        (folder / f"v{number}.mp4").write_bytes(grid_video(num_frames=16 + number))
    (folder / "v6_slow.mp4").write_bytes((VIDEOS / "screen_1080p.mp4").read_bytes())
    (folder / "v1_empty.mp4").write_bytes(b"")
    (folder / "v9_text.mp4").write_bytes(b"not a video")
    return folder


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "dataset"
    prepare([sources], out, SETTINGS)
    return out


def visible_files(dataset: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dataset.iterdir() if path.is_file()}


class Killer(threading.Thread):
    """Kills the process that is at a certain source, the first `times` times that it gets there."""

    def __init__(self, dataset: Path, source: str, times: int) -> None:
        super().__init__(daemon=True)
        self.work, self.source, self.times = dataset / ".prep", source, times
        self.killed: list[int] = []
        self.done = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.times and not self.done.wait(0.005):
            for marker in self.work.glob("*.current"):
                if marker.exists() and marker.read_text() == self.source:
                    for partial in self.work.glob(f"{marker.stem}.*.partial"):
                        pid = int(partial.name.split(".")[1])
                        if pid not in self.killed:
                            os.kill(pid, signal.SIGKILL)
                            self.killed.append(pid)


def prepare_under_fire(sources: Path, out: Path, source: str, times: int) -> PrepReport:
    killer = Killer(out, source, times)
    killer.start()
    report = prepare([sources], out, SETTINGS)
    killer.done.set()
    killer.join()
    assert len(killer.killed) == times
    return report


def test_the_dataset_holds_what_was_put_in(undisturbed: Path, sources: Path) -> None:
    index = ShardIndex.open(undisturbed)
    assert len(index.manifest.shards) == NUM_PARTS
    assert index.manifest.members == ("video", "sidecar")
    assert index.manifest.preparation == json.loads(json.dumps(SETTINGS.as_json()))
    by_source = [index.read_sidecar(index.record(n)).source for n in range(len(index))]
    # The slow one lasts 7 s and is cut in two.
    expected = [f"v{n}.mp4" for n in range(9)] + ["v6_slow.mp4"] * 2
    assert by_source == sorted(expected, key=str.encode)
    rejected = [json.loads(line) for line in (undisturbed / "rejected.jsonl").open()]
    assert [(line["source"], line["reason"]) for line in rejected] == [
        ("v1_empty.mp4", "empty"),
        ("v9_text.mp4", "not a video"),
    ]
    for number in range(len(index)):
        frames = decode_frames(index.read_member(index.record(number)), np.zeros(1), DecodeLimits())
        assert frames.frames_THWC.shape[0] == 1


def test_a_worker_killed_once_costs_nothing_but_time(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"
    report = prepare_under_fire(sources, out, "v6_slow.mp4", times=1)
    assert "decoder killed" not in report.rejected
    assert visible_files(out) == visible_files(undisturbed)


def test_a_source_that_kills_its_worker_twice_is_left_out_and_named(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"
    report = prepare_under_fire(sources, out, "v6_slow.mp4", times=2)
    assert report.rejected == {"decoder killed": 1, "empty": 1, "not a video": 1}
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").open()]
    assert [line["source"] for line in rejected if line["reason"] == "decoder killed"] == [
        "v6_slow.mp4"
    ]
    differing = {
        name for name, content in visible_files(undisturbed).items()
        if visible_files(out)[name] != content
    }  # fmt: skip
    assert {name for name in differing if name.endswith(".tar")} == {"shard-000002.tar"}
    assert len(ShardIndex.open(out)) == len(ShardIndex.open(undisturbed)) - 2


def part_with_a_hanging_decoder(job: PartJob) -> PartReport:
    """Where the decoder would stay for ever in one video, as no deadline between packets ends."""
    if any(source.name == "v4.mp4" for source in job.sources) and "v4.mp4" not in job.deadly:
        Ledger(Path(job.dataset_dir)).marker_path(job.number).write_text("v4.mp4")
        threading.Event().wait()
    return prepare_part(job)


def test_a_source_at_which_the_decoder_hangs_is_left_out_and_the_rest_goes_on(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "prepare_part", part_with_a_hanging_decoder)
    monkeypatch.setattr(driver, "_SLACK_SECONDS", 0.0)
    settings = PrepSettings(short_side=64, videos_per_shard=3, time_limit_seconds=1.5)
    videos = [sources / f"v{number}.mp4" for number in range(9)]
    report = prepare(videos, tmp_path / "out", settings)
    assert (report.rejected, report.num_samples) == ({"decoder killed": 1}, 8)


def test_a_second_run_does_only_what_is_missing_and_changes_nothing(
    undisturbed: Path, sources: Path
) -> None:
    before = visible_files(undisturbed)
    times = {path.name: path.stat().st_mtime_ns for path in undisturbed.glob("*.tar")}
    lost = undisturbed / "shard-000001.tar"
    lost.write_bytes(lost.read_bytes()[:1000])
    report = prepare([sources], undisturbed, SETTINGS, workers=Workers(num_cpus=1))
    assert report.num_kept_shards == NUM_PARTS - 1
    assert visible_files(undisturbed) == before
    kept = {path.name: path.stat().st_mtime_ns for path in undisturbed.glob("*.tar")}
    assert {name for name in times if kept[name] != times[name]} == {lost.name}


def test_another_dataset_is_never_mixed_in(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    before = visible_files(undisturbed)
    other = PrepSettings(short_side=48, videos_per_shard=3, max_seconds=4.0)
    with pytest.raises(UsageError, match="--short-side was 64, now 48"):
        prepare([sources], undisturbed, other)
    with pytest.raises(UsageError, match="sources were 12 videos of"):
        prepare([sources / "v0.mp4"], undisturbed, SETTINGS)
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="not prepared by"):
        prepare([sources], tmp_path, SETTINGS)
    assert visible_files(undisturbed) == before


def test_overwriting_replaces_a_dataset_and_nothing_else(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    prepare([sources / "v0.mp4", sources / "v1.mp4"], out, SETTINGS)
    (out / "README").write_text("mine")
    report = prepare([sources / "v2.mp4"], out, SETTINGS, overwrite=True)
    assert (report.num_samples, len(ShardIndex.open(out))) == (1, 1)
    assert (out / "README").read_text() == "mine"


def test_no_usable_video_at_all_is_a_data_error_that_names_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"none of 1 videos could be used: \{'empty': 1\}"
    ) as caught:
        prepare([tmp_path / "a.mp4"], tmp_path / "out", SETTINGS)
    assert "rejected.jsonl" in caught.value.remedy
    with pytest.raises(UsageError, match="no prepared dataset"):
        ShardIndex.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["ctrl-c", "sigterm"]
)
def test_a_stopped_command_keeps_finished_shards_and_says_how_to_continue(
    undisturbed: Path, sources: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    out = tmp_path / "dataset"
    command = (
        *(sys.executable, "-m", "pipeline.cli", "prep", "run", str(sources), "--out", str(out)),
        *("--short-side", "64", "--videos-per-shard", "3", "--max-seconds", "4"),
        *("--workers", "1"),
    )
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("*.tar")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # To the whole group, as a terminal or Slurm does.
        os.killpg(process.pid, sent)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert "the same command continues" in errors
    assert not (out / "manifest.json").exists()
    report = prepare([sources], out, SETTINGS)
    assert report.num_kept_shards >= 1
    assert visible_files(out) == visible_files(undisturbed)
