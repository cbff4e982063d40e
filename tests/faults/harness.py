"""Runs under faults: started, hurt, started again by the same command, and read from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.checkpoint import layout
from pipeline.config.load import resolved_yaml
from pipeline.track.metrics import read_events, read_metrics
from tests.plain import tiny_config

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
LIMIT_SECONDS = 300
PHASES = ("load", "forward", "backward", "agree", "step", "log", "write", "commit", "prune")
RATE = {"shape": "constant", "peak": 1e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to a rank; see `site/sitecustomize.py`."""

    phase: str
    step: int
    deed: str = "kill"
    rank: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one start of a run ended."""

    code: int
    output: str
    seconds: float


class Run:
    """A run of the tiny configuration and every start of it.

    Args:
        folder: Where it lies; its data are in `folder / "data"`.
        name: Its name.
        steps: Steps of its one stage.
        ranks: Ranks on this machine.
        changes: Other keys of the configuration.
    """

    def __init__(self, folder: Path, name: str, *, steps: int, ranks: int = 1, **changes) -> None:
        self.path, self.ranks = folder / name, ranks
        self._flags = folder / f"{name}-flags"
        self._flags.mkdir()
        self.yaml = folder / f"{name}.yaml"
        stage = {"steps": steps, "frames": 4, "fps": 4.0, "resolution": 32, "micro_batch": 2}
        data = {"sources": [{"path": str(folder / "data")}], "workers": 1}
        settings = {
            "name": name,
            "runs_folder": str(folder),
            "stages": [{**stage, "name": "only", "learning_rate": RATE}],
            "checkpoint": {"every_steps": 2, "keep_last": 2},
            **changes,
            "data": {**data, **changes.get("data", {})},
        }
        self.yaml.write_text(resolved_yaml(tiny_config(**settings)))

    def start(self, *faults: Fault) -> subprocess.Popen:
        """`jepa train --or-resume`, hurt as planned."""
        command = [sys.executable, "-m", "pipeline.cli", "train", str(self.yaml), "--or-resume"]
        ranks = ["--ranks", str(self.ranks)] if self.ranks > 1 else []
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(self.path.parent / "extensions"),
            "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)]),
            "JEPA_FAULTS": json.dumps(self._planned(faults)),
        }
        return subprocess.Popen(
            [*command, *ranks],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def attempt(self, *faults: Fault) -> Outcome:
        """Starts the run and waits for its end."""
        return finish(self.start(*faults))

    def wait_for_step(self, step: int) -> None:
        """Returns when the records know of a step."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            if self.path.joinpath("metrics.jsonl").exists() and self.steps()[-1:] >= [step]:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.path} never came to step {step}")

    def steps(self) -> list[int]:
        """Steps on record."""
        return [logged.report.step for logged in read_metrics(self.path)]

    def losses(self) -> list[tuple[int, str]]:
        """Every step's loss, bit for bit."""
        return [
            (logged.report.step, logged.report.loss.hex()) for logged in read_metrics(self.path)
        ]

    def commits(self) -> list[int]:
        """Steps of the checkpoints that are there."""
        return [commit.step for commit in layout.list_commits(self.path)]

    def events(self, name: str) -> list[dict]:
        """Details of all events of a name."""
        return [event.details for event in read_events(self.path) if event.name == name]

    def _planned(self, faults: Sequence[Fault]) -> list[dict]:
        begin = len(list(self._flags.iterdir()))
        return [
            {**asdict(fault), "flag": str(self._flags / f"{begin + number}-{fault.phase}")}
            for number, fault in enumerate(faults)
        ]


def finish(process: subprocess.Popen) -> Outcome:
    """Waits for a start's end."""
    begin = time.monotonic()
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.kill()
        raise
    return Outcome(code=process.returncode, output=output, seconds=time.monotonic() - begin)


def rank_pids(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that a launcher has started, rank 0 first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]
