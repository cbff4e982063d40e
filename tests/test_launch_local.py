"""The local launcher passes signals on and says with its exit code what the ranks said."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import start_ranks
from pipeline.cli import main
from pipeline.errors import ExitCode
from pipeline.track.faults import read_faults
from tests.running import wait_until


def rank_program(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "rank.py"
    path.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + text)
    return [str(path)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(78)", 78),
        # Rank 0 echoes the loss of its peer before the peer's own word is in: the cause wins.
        ("sys.exit(76 if rank == 0 else (time.sleep(0.3), 65)[1])", 65),
        ("sys.exit(65 if rank == 0 else 76)", 65),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(0.5)", 76),
    ],
)
def test_the_exit_code_is_the_ranks_word(tmp_path, text, expected):
    assert start_ranks(rank_program(tmp_path, text), num_ranks=2, port=1) == expected


def test_ranks_learn_their_place(tmp_path):
    text = (
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_PORT']\n"
        "open(f'{os.path.dirname(__file__)}/{rank}', 'w')"
        ".write(' '.join(os.environ[n] for n in names))"
    )
    assert start_ranks(rank_program(tmp_path, text), num_ranks=2, port=4711) == 0
    assert (tmp_path / "0").read_text() == "0 0 2 2 4711"
    assert (tmp_path / "1").read_text() == "1 1 2 2 4711"


@pytest.mark.parametrize(
    "flags",
    [["--min-nodes", "1"], ["--time", "1:00:00"], ["--site", "site.yaml"], ["--kind", "probe"]],
)
def test_a_flag_that_means_nothing_on_one_machine_is_refused(flags, capsys):
    words = ["launch", "local", "run.yaml", "--print", "--nodes", "1", "--ranks-per-node", "2"]
    assert main(words) == ExitCode.DONE
    assert "train run.yaml --or-resume --ranks 2\n" in capsys.readouterr().out
    assert main([*words, *flags]) == ExitCode.USAGE
    assert f"has no use for {flags[0]}\n" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_reaches_every_rank(tmp_path, number):
    text = (
        "folder = os.path.dirname(__file__)\n"
        "def stop(number, frame):\n"
        "    open(f'{folder}/got-{rank}', 'w').write(str(number)); sys.exit(75)\n"
        "for name in ('TERM', 'USR1', 'USR2', 'INT'):\n"
        "    signal.signal(signal.Signals['SIG' + name], stop)\n"
        "open(f'{folder}/ready-{rank}', 'w').close()\n"
        "time.sleep(600)\n"
    )
    words = rank_program(tmp_path, text)
    command = [sys.executable, "-m", "launch.local", "2", "1", str(tmp_path / "run"), *words]
    process = subprocess.Popen(command)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "two ranks that are ready")
    process.send_signal(number)
    assert process.wait(timeout=100) == 75
    assert [path.read_text() for path in sorted(tmp_path.glob("got-*"))] == [str(int(number))] * 2


def test_a_signal_before_the_ranks_listen_is_told_as_a_shell_would(tmp_path):
    text = "open(f'{os.path.dirname(__file__)}/ready-{rank}', 'w').close()\ntime.sleep(600)\n"
    command = [sys.executable, "-m", "launch.local", "2", "1", str(tmp_path / "run")]
    command += rank_program(tmp_path, text)
    process = subprocess.Popen(command)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "two ranks that are ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 128 + signal.SIGTERM


def test_a_rank_that_was_killed_is_written_down_with_its_signal(tmp_path):
    text = "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(0.3)"
    start_ranks(rank_program(tmp_path, text), num_ranks=2, port=1, run_dir=tmp_path)
    (fault,) = read_faults(tmp_path)
    assert (fault.rank, fault.exit_code, fault.told_by) == (1, 76, "launcher")
    assert fault.reason == "rank 1 was killed by signal 9 (SIGKILL)"
    assert not fault.is_echo
