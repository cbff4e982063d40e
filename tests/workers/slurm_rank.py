"""A rank without torch: what Slurm, srun and the batch script do is seen in a second.

`python -m tests.workers.slurm_rank HOW …` in the place of `jepa train`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
START = int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def main() -> int:
    how, *words = sys.argv[1:]
    say(f"runs below {Path(f'/proc/{os.getppid()}/comm').read_text().strip()}")
    ways = (crash, code, lock, save, check, fine, uncounted, limited, stopped)
    return {way.__name__: way for way in ways}[how](*words)


def say(words: str) -> None:
    sys.stdout.write(f"rank {RANK}, start {START}: {words}\n")
    sys.stdout.flush()


def fine() -> int:
    say(f"meets at {os.environ.get('MASTER_ADDR')}")
    return 0


def uncounted(run_dir: str) -> int:
    """Fails where nothing can be written down, as on a full disk."""
    (Path(run_dir) / "jobs" / f"{os.environ['SLURM_JOB_ID']}.failures").mkdir()
    return 1


def limited(run_dir: str) -> int:
    """Stops at a time limit of its own configuration."""
    event = {"time": time.time(), "event": "stop", "reason": "the time limit is near"}
    with (Path(run_dir) / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    (Path(run_dir) / "checkpoints" / "step-00000001").mkdir(parents=True)
    return 75


def stopped(run_dir: str) -> int:
    """Fails while somebody asks the run to stop, which nobody is there to hear."""
    (Path(run_dir) / "stop").touch()
    return 1


def crash() -> int:
    """Rank 1 fails; the others stop in good order when they are asked to."""
    if RANK == 1:
        time.sleep(1)
        return 1
    return wait_to_be_asked(0)


def code(number: str, run_dir: str) -> int:
    """Rank 1 knows why nothing will help, and says so in a lower code than that of a kill."""
    if RANK != 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    folder = Path(run_dir) / "faults"
    folder.mkdir(exist_ok=True)
    word = {"rank": 1, "reason": "so it is", "exit_code": int(number), "kind": "SomeError"}
    (folder / f"fault-{START}-1-rank.json").write_text(json.dumps(word) + "\n")
    return int(number)


def lock() -> int:
    """A build that is killed leaves its lock; the next start would wait for it for ever."""
    path = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "lock"
    say(f"lock {path} is there: {path.exists()}")
    path.touch()
    return 1 if START == 0 else 0


def save(seconds: str, run_dir: str) -> int:
    """Saves for a while once it is asked to, and is done when it is started again."""
    if START > 0:
        return 0
    return wait_to_be_asked(float(seconds), Path(run_dir))


def check(bad_node: str, *_: str) -> int:
    """A preflight that finds fault with one node, and names it for the batch script."""
    here = os.environ["SLURMD_NODENAME"] in bad_node.split(",")
    if here:
        Path(sys.argv[sys.argv.index("--bad-nodes") + 1]).write_text(
            f"{os.environ['SLURMD_NODENAME']}\n"
        )
    return 76 if here else 0


def wait_to_be_asked(seconds: float, run_dir: Path | None = None) -> int:
    def stop(number: int, _frame: object) -> None:
        for name in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(name, signal.SIG_IGN)
        say(f"asked by {signal.Signals(number).name}")
        time.sleep(seconds)
        if run_dir is not None and RANK == 0:
            (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
        say("saved")
        sys.exit(75)

    for name in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, stop)
    say("listens")
    while True:
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
