"""The verbs of `jepa launch`."""

import json as json_text
import os
import re
import shlex
import sys
from dataclasses import asdict, fields
from typing import Annotated

from cyclopts import Parameter

from launch.request import Request, prepare
from launch.slurm import render
from launch.submit import by_hand, submit, try_out
from pipeline.errors import ExitCode, UsageError

Words = Annotated[
    str,
    Parameter(
        help="CONFIG [key=value ...]; with --kind what follows `jepa KIND`, after `--` if it "
        "begins with a dash."
    ),
]
Flags = Annotated[Request | None, Parameter(name="*")]
JsonFlag = Annotated[bool, Parameter(name="--json", negative="")]
PrintFlag = Annotated[bool, Parameter(negative="")]
_AFTER = re.compile(r"(?:(after|afterok|afterany|afternotok):)?(\d+)")


def slurm(
    *words: Words,
    after: tuple[str, ...] = (),
    print: PrintFlag = False,
    dry_run: bool = False,
    request: Flags = None,
    json: JsonFlag = False,
) -> ExitCode:
    """Submit a job to Slurm: a training run, or preparation, probes or the conductor beside one.

    Prints the job's number, its log, and how to watch and stop it.

    Args:
        words: CONFIG and key=value over it; with --kind what follows `jepa KIND`.
        after: Start when job N has ended with 0; also after:N (has begun), afterany:N,
            afternotok:N, singleton (one job of a name at a time). May be repeated.
        print: Print the batch script and submit nothing.
        dry_run: Ask Slurm whether it would take the job, and submit nothing.
        request: What the job needs; the site file has the rest.
        json: Print the submission as JSON.
    """
    if not words:
        raise UsageError("expected CONFIG, or with --kind the words of that verb, got nothing")
    prepared = prepare(words, request or Request())
    waits = tuple(_dependency(word) for word in after)
    text = render(prepared.job, prepared.site, after=waits)
    if print:
        sys.stdout.write(text)
        sys.stderr.write(by_hand(prepared.job, words) + "\n")
        return ExitCode.DONE
    if dry_run:
        sys.stdout.write(try_out(text) + "\n")
        return ExitCode.DONE
    submitted = submit(prepared.job, text, after=waits)
    shown = json_text.dumps(asdict(submitted.record), indent=2) if json else submitted.words
    sys.stdout.write(shown + "\n")
    return ExitCode.DONE


def local(
    *words: Words,
    print: PrintFlag = False,
    request: Flags = None,
) -> ExitCode:
    """Train on this machine: `jepa train CONFIG --ranks N --or-resume`, one rank for each GPU.

    Of the flags below only --gpus-per-node and --ranks-per-node are for this machine; there is one
    rank by default.

    Args:
        words: CONFIG and key=value over it.
        print: Print the command and start nothing.
        request: How many ranks.
    """
    if not words:
        raise UsageError("expected CONFIG, the YAML file of a run, got nothing")
    wanted = request or Request()
    unheard = [name for name in _given(wanted) if name not in ("gpus-per-node", "ranks-per-node")]
    if wanted.nodes == 1:
        unheard.remove("nodes")
    if unheard:
        raise UsageError(
            "jepa launch local trains on this one machine, and has no use for "
            + ", ".join(f"--{name}" for name in unheard),
            remedy="Run other verbs directly; for several machines use slurm or k8s.",
        )
    ranks = wanted.gpus_per_node or wanted.ranks_per_node or 1
    command = ["-m", "pipeline.cli", "train", *words, "--or-resume", "--ranks", str(ranks)]
    if print:
        sys.stdout.write(shlex.join(["python", *command]) + "\n")
        return ExitCode.DONE
    sys.stdout.flush()
    # In this process's place, so that signals and the exit code are the run's own.
    return os.execv(sys.executable, [sys.executable, *command])  # noqa: S606 - our own module


def _given(request: Request) -> list[str]:
    """Names of the flags that say something."""
    told = [one.name for one in fields(request) if getattr(request, one.name) != one.default]
    return [name.replace("_", "-") for name in told]


def _dependency(word: str) -> str:
    if word == "singleton":
        return word
    match = _AFTER.fullmatch(word)
    if match is None:
        raise UsageError(
            f"expected the number of a job for --after, got {word!r}",
            remedy="Give --after 17, or after:17, afterany:17, afternotok:17, singleton.",
        )
    return f"{match[1] or 'afterok'}:{match[2]}"
