"""Preparation: clips a second per core beside plain transcoding, and the driver's cost by rows.

Speed. The reference makes the same files from the same videos with nothing around it: a process of
the `ffmpeg` command per file where that is installed, otherwise a plain PyAV loop in one process;
the result says which. Both decode once, up to a length of video that preparation has room for.

Rows. Sources that do not exist are listed, noted as done, cut into shards and published on paper,
each number of rows in a process of its own: what is left is what the driver itself costs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.plain_transcode import transcode_plainly
from benchmarks.result import print_table, spread, write_result
from data_prep.allocation import allocate, unfinished_shards
from data_prep.driver import Workers
from data_prep.figures import figures_of
from data_prep.item import ItemJob, prepare_item
from data_prep.kinds.opening import open_sources
from data_prep.ledger import Ledger
from data_prep.prepare import Inputs, prepare
from data_prep.publication import publish_dataset
from data_prep.records import ItemRecord, SegmentFigures, SegmentRecord, Source
from data_prep.samples import sample_key
from data_prep.settings import PrepSettings
from pipeline.cluster import local_ray
from pipeline.data.layout import INDEX_DTYPE, ShardEntry

_VIDEOS = Path("tests/data/videos")
_NAMES = ("screen_1080p.mp4", "bikes_640x272.mp4", "av1_540p_15s.mp4", "carphone_qcif.mp4")
# The same work on both sides: nothing is left out, and every video is one file.
_SETTINGS = PrepSettings(cut="stride", duplicates="keep", max_seconds=600.0)
_KIB = 1024


def main() -> int:
    """Measures and writes `prep.json`."""
    arguments = _arguments()
    if arguments.only_rows is not None:
        sys.stdout.write(json.dumps(_driver_cost(arguments.only_rows)))
        return 0
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="jepa-prep-bench-") as name:
        folder = Path(name)
        videos = _videos(folder / "videos", arguments.videos, arguments.copies)
        figures |= _speed(folder, videos, arguments.workers, arguments.rounds)
    figures["driver by rows"] = [_in_own_process(rows) for rows in arguments.rows]
    for row in figures["driver by rows"]:
        print_table(f"Driver, {row['rows']} rows", ("figure", "value"), list(row.items()))
    path = write_result("prep", figures, {name: str(v) for name, v in vars(arguments).items()})
    print(f"written to {path}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, help="folder of good videos; those of the tests")
    parser.add_argument("--copies", type=int, default=4, help="of each video")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="*", default=[10**4, 10**5, 10**6])
    parser.add_argument("--only-rows", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _videos(folder: Path, given: Path | None, copies: int) -> list[Path]:
    originals = sorted(given.iterdir()) if given else [_VIDEOS / name for name in _NAMES]
    folder.mkdir()
    made = [folder / f"{n:03d}-{path.name}" for n in range(copies) for path in originals]
    for number, path in enumerate(made):
        shutil.copy(originals[number % len(originals)], path)
    return made


def _speed(folder: Path, videos: list[Path], workers: int, rounds: int) -> dict[str, object]:
    prepared, plain = [], []
    with local_ray(num_cpus=workers) as ray:
        # Unmeasured: workers start, and import what they need.
        warm = Inputs(arguments=tuple(map(str, videos[:workers])))
        prepare(warm, folder / "warm", _SETTINGS, workers=Workers(num_cpus=workers))
        for number in range(rounds):
            out = folder / f"out{number}"
            begin = time.perf_counter()
            inputs = Inputs(arguments=(str(folder / "videos"),))
            report = prepare(inputs, out, _SETTINGS, workers=Workers(num_cpus=workers))
            prepared.append(report.num_samples / (time.perf_counter() - begin))
            plain.append(len(videos) / _plain_seconds(videos, folder))
        peaks = ray.get([ray.remote(_peak_mib).remote() for _ in range(4 * workers)])
    spent = [_spent(video, folder / "spent") for video in videos[: len(_NAMES)]]
    outside = 1 - sum(inside for inside, _ in spent) / sum(total for _, total in spent)
    rate, single = spread(prepared), spread(plain)
    figures: dict[str, object] = {
        "reference": "ffmpeg per file" if shutil.which("ffmpeg") else "one PyAV loop",
        "prepared clips/s": rate,
        "reference clips/s, one process": single,
        "prepared / (workers × reference)": rate["median"] / (workers * single["median"]),
        "share of a worker's time outside a plain transcode": outside,
        "largest memory of a worker, MiB": max(peaks),
        "largest memory of the driver, MiB": _peak_mib(),
    }
    print_table("Preparation", ("figure", "value"), list(figures.items()))
    return figures


def _plain_seconds(videos: list[Path], folder: Path) -> float:
    begin = time.perf_counter()
    for video in videos:
        transcode_plainly(video, folder / "plain.mp4", _SETTINGS)
    return time.perf_counter() - begin


def _spent(video: Path, folder: Path) -> tuple[float, float]:
    """Seconds of a plain transcode, and of all that preparation does with a video."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (source,) = open_sources([str(video)])
    job = ItemJob(
        source=source,
        item="item",
        settings=_SETTINGS,
        result=str(folder / "item.tar"),
        marker=str(folder / "marker"),
    )
    # Once unmeasured: what is imported and allocated at first use is not this video's.
    prepare_item(job)
    (folder / "item.tar").unlink()
    total = prepare_item(job).seconds
    return _plain_seconds([video], folder), total


def _in_own_process(rows: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.prep", "--only-rows", str(rows)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def _driver_cost(rows: int) -> dict[str, float]:
    """What the driver does for so many sources, without the work on them."""
    before = _peak_mib()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, Ledger.open(Path(name), _SETTINGS) as ledger:
        steps = {
            "list": lambda: ledger.add_sources(_sources(rows), _SETTINGS),
            "note": lambda: [ledger.note(_record(s.name)) for s, _ in ledger.pending()] and None,
            "allocate": lambda: allocate(ledger, _SETTINGS),
            "plan shards": lambda: _pack_on_paper(ledger),
            "list refusals": lambda: sum(1 for _ in ledger.rejections()),
            "count figures": lambda: figures_of(ledger.records()),
            "publish": lambda: publish_dataset(ledger, _SETTINGS),
            "list again": lambda: ledger.add_sources(_sources(rows), _SETTINGS),
        }
        for step, do in steps.items():
            begin = time.perf_counter()
            do()
            seconds[f"{step}, microseconds a row"] = 1e6 * (time.perf_counter() - begin) / rows
        size = sum(path.stat().st_size for path in ledger.folder.iterdir() if path.is_file())
    return {
        "rows": rows,
        **{step: round(value, 2) for step, value in seconds.items()},
        "memory above an idle driver, MiB": round(_peak_mib() - before, 1),
        "ledger, bytes a row": round(size / rows, 1),
    }


def _pack_on_paper(ledger: Ledger) -> None:
    """Shards without bytes, and the rows of the index that they would have."""
    ledger.shard_rows(0).parent.mkdir()
    for plan in unfinished_shards(ledger):
        keys = [key for _, keys in plan.items for key in keys]
        rows = np.zeros(len(keys), INDEX_DTYPE)
        rows["key"], rows["duration_seconds"] = keys, 10.0
        np.save(ledger.shard_rows(plan.number), rows)
        shard = ledger.shard_path(plan.number)
        shard.touch()
        entry = ShardEntry(name=shard.name, bytes=0, sha256="0" * 64, num_samples=len(keys))
        rows_path = ledger.shard_rows(plan.number).with_suffix(".json")
        rows_path.write_text(entry.model_dump_json())
    ledger.database.execute("UPDATE shard SET done = 1")


def _sources(rows: int) -> Iterator[Source]:
    for number in range(rows):
        name = f"folder-{number % 997:03d}/video-{number:09d}.mp4"
        yield Source(name=name, locator=f"/data/{name}", num_bytes=1 << 20, modified_ns=1)


def _record(name: str) -> ItemRecord:
    look = f"{hash(name) & (1 << 64) - 1:016x}"
    figures = SegmentFigures(motion=3.0, black_share=0.0, still_share=0.1, hashes=(look,) * 8)
    segment = SegmentRecord(
        number=0,
        key=sample_key(name, 0),
        start_seconds=0.0,
        end_seconds=10.0,
        num_frames=80,
        fps=8.0,
        width=512,
        height=384,
        num_bytes=1 << 20,
        video_sha256=look * 4,
        content_sha256=look * 4,
        figures=figures,
    )
    return ItemRecord(
        source=name, seconds=10.0, codec="h264", fps=30.0, width=1280, height=720,
        segments=(segment,),
    )  # fmt: skip


def _peak_mib() -> float:
    # Not ru_maxrss: a process takes over that of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / _KIB for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main())
