"""What the conductor costs a training that runs on the same machine.

One training goes on throughout, saving often. In turns of equal length a conductor verifies,
mirrors, exports and probes its checkpoints, or does not; the time of steps is compared. Starting
the conductor and its Ray, and ending them, counts as its work.

    python -m benchmarks.conduct [--rounds 4] [--seconds 60] [--ranks 2] [--nice 19] [--dry]
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.commands import jepa, say
from benchmarks.result import print_table, write_result
from pipeline.checkpoint.layout import list_commits
from pipeline.errors import ExitCode
from pipeline.track.journal import read_journal
from pipeline.track.metrics import read_metrics

_GOAL_SHARE = 0.05
_ENDLESS_STEPS = 1_000_000
# Steps around a change of turns belong to neither.
_MARGIN_SECONDS = 1.0
_LIMIT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """A stretch of time with or without a conductor, unix seconds."""

    with_conductor: bool
    begin: float
    end: float


def main() -> int:
    """Measures, prints and writes benchmarks/results/conduct.json."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, arguments)
        training = _train(folder, arguments)
        try:
            _wait_for_checkpoint(folder / "live")
            turns = _take_turns(folder, arguments)
        finally:
            training.send_signal(signal.SIGTERM)
            training.wait(_LIMIT_SECONDS)
        figures = _figures(folder / "live", turns)
    rows = [(key, json.dumps(value)) for key, value in figures.items()]
    print_table("A step beside the conductor", ("", "figure"), rows)
    if not arguments.dry:
        print(write_result("conduct", figures, vars(arguments)))
    return 0


def _prepare(folder: Path, arguments: argparse.Namespace) -> None:
    easy = "--size 64 --difficulty 0"
    jepa(f"prep synthetic {folder}/videos --videos 48 --validation 0 --test 0 --seed 1 {easy}")
    jepa(f"prep run {folder}/videos/videos --out {folder}/shards --short-side 64")
    jepa(f"prep synthetic {folder}/set --videos 240 --validation 60 --test 0 --seed 2 {easy}")
    data = [f"data.videos={folder}/set/videos", f"data.annotations={folder}/set/labels"]
    asked = {
        "mirror": {"url": f"file://{folder}/mirror"},
        "export": {"formats": ["safetensors", "hf"], "check": False},
        "probes": [{"task": "synthetic", "overrides": data, "heads": ["linear", "knn"]}],
        "retention": {"hold_at_most": 100},
        "nice": arguments.nice,
        "poll_seconds": 1.0,
    }
    (folder / "conduct.yaml").write_text(json.dumps(asked))


def _train(folder: Path, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    rate = {"shape": "constant", "peak": 1e-4}
    shape = {"frames": 8, "fps": 4.0, "resolution": 64, "micro_batch": 4}
    stage = {**shape, "name": "long", "steps": _ENDLESS_STEPS, "learning_rate": rate}
    changes = [
        "name=live",
        f"runs_folder={folder}",
        f"stages={json.dumps([stage])}",
        f"data.sources={json.dumps([{'path': str(folder / 'shards')}])}",
        f"checkpoint.every_steps={arguments.save_every}",
        f"checkpoint.keep_every_steps={arguments.save_every}",
    ]
    command = [sys.executable, "-m", "pipeline.cli", "train", "pipeline/configs/tiny-cpu.yaml"]
    ranks = ["--ranks", str(arguments.ranks)]
    return subprocess.Popen([*command, *changes, *ranks], stdout=subprocess.DEVNULL)


def _take_turns(folder: Path, arguments: argparse.Namespace) -> list[_Turn]:
    turns = []
    for number in range(2 * arguments.rounds):
        # Off, on, on, off: a slow drift of the machine falls on both alike.
        with_conductor = number % 4 in (1, 2)
        say(f"{arguments.seconds} s {'with' if with_conductor else 'without'} a conductor")
        begin = time.time()
        conductor = _conduct(folder) if with_conductor else None
        time.sleep(arguments.seconds)
        if conductor is not None:
            _wait_for_start(folder / "live", begin)
            conductor.send_signal(signal.SIGTERM)
            code = conductor.wait(_LIMIT_SECONDS)
            if code != ExitCode.SAVED_RUN_AGAIN:
                raise SystemExit(f"the conductor ended with {code}")
        turns.append(_Turn(with_conductor=with_conductor, begin=begin, end=time.time()))
    return turns


def _conduct(folder: Path) -> subprocess.Popen[bytes]:
    words = ["conduct", str(folder / "live"), "--config", str(folder / "conduct.yaml")]
    command = [sys.executable, "-m", "pipeline.cli", *words]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def _wait_for_checkpoint(run_dir: Path) -> None:
    deadline = time.monotonic() + _LIMIT_SECONDS
    # A few, so that the conductor has work from its first second on.
    while len(list_commits(run_dir)) < 3:
        if time.monotonic() > deadline:
            raise SystemExit("the training saved nothing")
        time.sleep(0.5)


def _wait_for_start(run_dir: Path, begin: float) -> None:
    """A turn ends only when the conductor has come to work: on a busy machine it may be loading."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not any(e.event == "begin" and e.time > begin for e in read_journal(run_dir)):
        if time.monotonic() > deadline:
            raise SystemExit("the conductor never began")
        time.sleep(0.5)


def _figures(run_dir: Path, turns: list[_Turn]) -> dict[str, Any]:
    steps = read_metrics(run_dir)
    medians: dict[bool, list[float]] = {True: [], False: []}
    for turn in turns:
        inside = [
            step.report.step_seconds
            for step in steps
            if turn.begin + _MARGIN_SECONDS < step.time < turn.end - _MARGIN_SECONDS
        ]
        if inside:
            medians[turn.with_conductor].append(statistics.fmean(inside))
    alone, beside = (statistics.median(medians[which]) for which in (False, True))
    done = [entry for entry in read_journal(run_dir) if entry.event == "done"]
    kinds = sorted({entry.key.partition("@")[0].partition("~")[0] for entry in done})
    share = beside / alone - 1.0
    return {
        "step_ms_alone": round(1000 * alone, 2),
        "step_ms_beside": round(1000 * beside, 2),
        "load_share": round(share, 4),
        "goal_share": _GOAL_SHARE,
        "is_met": share <= _GOAL_SHARE and bool(done),
        "turns_ms_alone": [round(1000 * value, 2) for value in medians[False]],
        "turns_ms_beside": [round(1000 * value, 2) for value in medians[True]],
        "jobs_done": {kind: sum(e.key.startswith(kind) for e in done) for kind in kinds},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="pairs of turns")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a turn")
    parser.add_argument("--ranks", type=int, default=2, help="ranks that train")
    parser.add_argument("--nice", type=int, default=19, help="priority of the conductor")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--dry", action="store_true", help="write no result")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
