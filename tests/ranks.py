"""Runs a worker module on several ranks that meet over loopback, and hands back what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.environment import free_port

ROOT = Path(__file__).parent.parent


def run_on_ranks(module: str, num_ranks: int, out: Path, arguments: dict) -> list[dict]:
    """Starts `python -m module OUT ARGUMENTS` once a rank; each writes OUT/rank-R.json."""
    out.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    started = []
    for rank in range(num_ranks):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, "-m", module, str(out), json.dumps(arguments)]
        with (out / f"log-{rank}.txt").open("w") as log:
            started.append(
                subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            )
    codes = [process.wait(timeout=240) for process in started]
    logs = [(out / f"log-{rank}.txt").read_text() for rank in range(num_ranks)]
    assert codes == [0] * num_ranks, f"exit codes {codes}\n" + "\n".join(
        log[-4000:] for log in logs
    )
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
