"""Running `jepa` as a user would, each command printed before it is run."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import ExitCode

# Small pictures, large plain movements: what an encoder of half a million weights can learn.
_EASY = "--size 64 --difficulty 0"


def jepa(words: str) -> None:
    """Runs a command; ends the program with its exit code if it fails."""
    code = subprocess.run(command(words), check=False).returncode
    if code != ExitCode.DONE:
        raise SystemExit(code)


def jepa_json(words: str) -> Any:
    """Runs a command with `--json` and returns what it prints."""
    done = subprocess.run(
        command(f"{words} --json"), check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != ExitCode.DONE:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def command(words: str) -> list[str]:
    """The argument list of a `jepa` command; prints the command."""
    say(f"\n$ jepa {words}")
    return [sys.executable, "-m", "pipeline.cli", *shlex.split(words)]


def say(text: str) -> None:
    """Prints a line at once, in order with what commands print."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def make_dataset(folder: Path, *, num_unlabelled: int, num_train: int, num_validation: int) -> None:
    """Renders clips to pretrain on and other clips to probe with, and prepares the former.

    The real videos of the tests go into the shards too, broken ones among them: preparation turns
    those away and says why.
    """
    jepa(
        f"prep synthetic {folder}/unlabelled --videos {num_unlabelled} --validation 0 --test 0 "
        f"--seed 1 {_EASY}"
    )
    jepa(
        f"prep synthetic {folder}/labelled --videos {num_train} --validation {num_validation} "
        f"--test 12 --seed 2 {_EASY}"
    )
    sources = f"{folder}/unlabelled/videos tests/data/videos"
    jepa(f"prep run {sources} --out {folder}/shards --short-side 64")


def probe_words(run: Path, folder: Path, steps: str) -> str:
    """The probe of a run's steps on the labelled clips of `make_dataset`."""
    data = f"data.videos={folder}/labelled/videos data.annotations={folder}/labelled/labels"
    return f"probe {run} --steps {steps} --task synthetic {data}"
