"""The first process of a pod: waits for the others, checks the machine, starts the pod's ranks.

`python -m launch.k8s_pod [--wait S] [--check S] [--gpus G] [--run FOLDER] train CONFIG …`. A pod is
one machine of the run. Its place comes from the Job's completion index, so every pod runs the same
words, and the exit code is the ranks' own: the Job's failure policy reads it.

The kernel drops signals that process 1 of a container has no handler for, and Python needs seconds
to import what the ranks' launcher needs. So this file imports little and listens first.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.errors import ExitCode, JepaError, PeerLostError, UsageError
from pipeline.place import Node, node_of

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_RETRY_SECONDS = 0.5
# The usual delay is shorter and not worth a word.
_SILENT_SECONDS = 10.0
_WAIT_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What stands before the words of `jepa`."""

    words: tuple[str, ...]
    wait_seconds: float = _WAIT_SECONDS
    check_seconds: float | None = None
    num_gpus: int = 0
    run_dir: Path = Path("run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one pod to its end.

    Returns:
        What the pod's ranks said, but 0 if the run was stopped on purpose; 76 if the first pod's
        name is never known; the code of `jepa check` if the machine is refused; 128 + n if signal n
        came before any rank.
    """
    for number in _SIGNALS:
        signal.signal(number, _end_early)
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        node = node_of(dict(os.environ))
        wait_for_name(node, options.wait_seconds)
    except JepaError as error:
        sys.stderr.write(f"error: {error}\nwhat to do: {error.remedy}\n")
        return int(error.exit_code)
    code = _check(node, options)
    return code if code else _run(node, options)


def parse_options(arguments: Sequence[str]) -> Options:
    """Takes our own options from the front of the words.

    Raises:
        UsageError: A value is missing or no number, or no words are left.
    """
    words, found = list(arguments), dict[str, str]()
    while words and words[0] in ("--wait", "--check", "--gpus", "--run"):
        if len(words) == 1:
            raise UsageError(f"expected a value after {words[0]}")
        found[words[0]] = words[1]
        words = words[2:]
    if not words or words[0].startswith("-"):
        raise UsageError(f"expected the words of `jepa train`, got {' '.join(words) or 'nothing'}")
    try:
        return Options(
            words=tuple(words),
            wait_seconds=float(found.get("--wait", _WAIT_SECONDS)),
            check_seconds=float(found["--check"]) if "--check" in found else None,
            num_gpus=int(found.get("--gpus", 0)),
            run_dir=Path(found.get("--run", "run")),
        )
    except ValueError:
        raise UsageError(f"expected numbers for --wait, --check and --gpus, got {found}") from None


def wait_for_name(node: Node, seconds: float) -> str:
    """Waits until the first pod's name is known; it is published when that pod has an address.

    Returns:
        The address.

    Raises:
        PeerLostError: It is not known in time.
    """
    deadline = time.monotonic() + seconds
    told_at = time.monotonic() + _SILENT_SECONDS
    while True:
        try:
            found = socket.getaddrinfo(node.master_address, node.master_port)
            return str(found[0][4][0])
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                raise PeerLostError(
                    f"node {node.rank} of {node.count} waited {seconds:.0f} s for the name of node "
                    f"0, {node.master_address}, and it is still not known: {error}",
                    remedy="See whether pod 0 is there (`kubectl get pods -o wide`) and whether "
                    "the headless Service has its name and publishNotReadyAddresses.",
                ) from error
            if time.monotonic() >= told_at:
                sys.stderr.write(f"node {node.rank} waits for the name {node.master_address}\n")
                told_at = deadline
        time.sleep(_RETRY_SECONDS)


def _check(node: Node, options: Options) -> int:
    """`jepa check` on all pods together, one process each; 0 if the ranks may start."""
    # `resume` names a run and no configuration to check.
    if options.check_seconds is None or options.words[0] != "train":
        return ExitCode.DONE
    config, *rest = options.words[1:]
    overrides = [word for word in rest if not word.startswith("-")]
    seconds = ["--seconds", str(options.check_seconds)]
    gpus = ["--gpus-per-node", str(options.num_gpus)] if options.num_gpus else []
    words = ["check", config, *overrides, "--at-start", *seconds, *gpus]
    env = {
        **os.environ,
        "RANK": str(node.rank),
        "WORLD_SIZE": str(node.count),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": node.master_address,
        "MASTER_PORT": str(node.master_port),
    }
    # Killed with us: `run` does so when a signal raises out of it.
    command = [sys.executable, "-m", "pipeline.cli", *words]
    return subprocess.run(command, env=env, check=False).returncode


def _run(node: Node, options: Options) -> int:
    from launch.local import run_node  # noqa: PLC0415 - imports torch: we must listen before
    from launch.stopped import is_stopped_for_good  # noqa: PLC0415 - likewise

    arguments = ["-m", "pipeline.cli", *options.words]
    code = run_node(arguments, node=node, run_dir=options.run_dir)
    if code == ExitCode.SAVED_RUN_AGAIN and is_stopped_for_good(options.run_dir):
        sys.stderr.write("stopped by `jepa stop` or the run's own time limit: not started again\n")
        return ExitCode.DONE
    return code


def _end_early(number: int, _frame: FrameType | None) -> None:
    """Nothing has begun, so there is nothing to save."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
