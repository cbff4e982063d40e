"""Real runs as processes: started by the command line, waited for, signalled, looked into."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.config.load import resolved_yaml
from pipeline.environment import free_port
from pipeline.track.faults import read_faults, with_faults
from pipeline.track.metrics import Event, read_events, read_metrics
from tests.plain import tiny_config

LIMIT_SECONDS = 150


def jepa(*words: object, module: str = "pipeline.cli", **changes: str) -> subprocess.Popen:
    """Starts `jepa WORDS` (or another module that ends in the same command line)."""
    command = [sys.executable, "-m", module, *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def faulty(faults: list[dict], run: Path, *words: object, ranks: int = 2) -> subprocess.Popen:
    """Starts ranks that make faults (`tests.workers.faulty_run`) under the local launcher."""
    worker = ["-m", "tests.workers.faulty_run", *map(str, words)]
    launcher = [str(ranks), str(free_port()), str(run)] if ranks > 1 else []
    command = ["-m", "launch.local", *launcher, *worker] if launcher else worker
    env = {**os.environ, "OMP_NUM_THREADS": "1", "JEPA_TEST_FAULTS": json.dumps(faults)}
    return subprocess.Popen(
        [sys.executable, *command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, seconds: float = LIMIT_SECONDS) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"it did not end within {seconds} s:\n{output[-4000:]}") from None
    return process.returncode, output


def long_stage(steps: int = 100_000, **changes) -> list[dict]:
    """One stage that a test does not see the end of."""
    stage = json.loads(tiny_config().model_dump_json())["stages"][0]
    rate = {"shape": "constant", "peak": 1e-3}
    return [{**stage, "name": "long", "steps": steps, "learning_rate": rate, **changes}]


def write_config(folder: Path, name: str, **changes) -> Path:
    """A configuration of the tiny run on the dataset FOLDER/data, saving every other step."""
    # Processes of loader workers take seconds to start; tests that are about them ask for some.
    data = {"sources": [{"path": str(folder / "data")}], "workers": 0, **changes.pop("data", {})}
    checkpoint = {"every_steps": 2, "keep_last": 2, **changes.pop("checkpoint", {})}
    config = tiny_config(
        name=name, runs_folder=str(folder), data=data, checkpoint=checkpoint, **changes
    )
    path = folder / f"{name}.yaml"
    path.write_text(resolved_yaml(config))
    return path


def wait_until(what: Callable[[], bool], words: str, seconds: float = LIMIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"never: {words}"
        time.sleep(0.05)


def wait_for_step(run: Path, step: int) -> None:
    def is_there() -> bool:
        return (run / "metrics.jsonl").exists() and len(read_metrics(run)) >= step

    wait_until(is_there, f"{run} at step {step}")


def rank_pids(launcher: subprocess.Popen) -> list[int]:
    """The ranks of a local launcher, in order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children]


def all_events(run: Path) -> list[Event]:
    """Events of rank 0 and the last words of all processes."""
    return list(with_faults(read_events(run), read_faults(run)))


def reasons(run: Path, name: str) -> list[str]:
    return [str(event.details.get("reason")) for event in all_events(run) if event.name == name]
