"""A dataset whose reading sabotages the worker that reads it: what hostile videos do, on demand."""

import os
import signal
from pathlib import Path

import numpy as np

from pipeline.data import clips
from pipeline.data.decode import decode_frames
from pipeline.data.format import ShardIndex
from pipeline.data.layout import Member

PLAN = "sabotage.txt"


class SabotagedIndex(ShardIndex):
    """Reads as its parent; `FOLDER/sabotage.txt` says `KEY DEED TIMES` for what happens when."""

    def read_member(self, record, member=Member.VIDEO):
        if member is Member.VIDEO:
            clips.decode_frames = DEEDS[self._deed(record.key)]
        return super().read_member(record, member)

    def _deed(self, key: str) -> str:
        for line in (self.path / PLAN).read_text().splitlines():
            victim, deed, times = line.split()
            done = self.path / f"done-{victim}-{os.getpid()}"
            if victim == key and len(list(self.path.glob(f"done-{victim}-*"))) < int(times):
                done.touch()
                return deed
        return "decode"


def plan(folder: Path, *lines: str) -> None:
    for done in folder.glob("done-*"):
        done.unlink()
    (folder / PLAN).write_text("\n".join(lines))


def _crash(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _loop(*_):
    while True:
        pass


def _bomb(*_):
    return np.ones(8 << 30, dtype=np.uint8)


DEEDS = {"decode": decode_frames, "crash": _crash, "kill": _die, "loop": _loop, "bomb": _bomb}
