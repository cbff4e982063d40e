"""A process that was killed while it built an extension must not hang every later start."""

import subprocess
import sys

USE = """
import sys
from pathlib import Path
from pipeline.buildlocks import clear_stale_locks
print(len(clear_stale_locks(Path(sys.argv[1]))), flush=True)
sys.stdin.read()
"""


def start(folder) -> subprocess.Popen:
    command = [sys.executable, "-c", USE, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_lock_is_removed_when_its_process_is_dead_and_kept_while_any_user_lives(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    first = start(tmp_path)
    assert first.stdout.readline() == "0\n"
    lock.parent.mkdir()
    lock.touch()
    with start(tmp_path) as second:
        assert second.stdout.readline() == "0\n", "the first may be building"
        second.stdin.close()
    assert lock.exists()
    first.kill()
    first.communicate()
    with start(tmp_path) as third:
        assert third.stdout.readline() == "1\n"
        third.stdin.close()
    assert not lock.exists()


def test_a_folder_that_cannot_be_used_is_left_to_torch(tmp_path):
    (tmp_path / "file").touch()
    with start(tmp_path / "file" / "below") as process:
        assert process.stdout.readline() == "0\n"
        process.stdin.close()
