"""`jepa` with faults on order: JEPA_TEST_FAULTS holds them as JSON, the rest is the real thing.

{"rank": 1, "step": 3, "fault": "nan"}      that rank's loss is not a number
{"step": 4, "fault": "inf_gradient"}        a finite loss whose gradient is not
{"step": 9, "fault": "spike"}               a loss a hundred times as large, gradient and all
{"step": 5, "fault": "raise"}               an error of our own making
{"rank": 1, "fault": "slow_write", "seconds": 4}   every save's writing takes longer, or one step's
{"rank": 0, "fault": "slow_copy", "seconds": 1}    every save's copy begins late, or one step's
{"rank": 1, "fault": "slow_data", "seconds": 0.2}  waiting for every micro-batch
{"rank": 0, "step": 3, "fault": "await_signal"}    micro-batches of that step wait for a signal
{"rank": 1, "step": 2, "fault": "late_write", "until": 3}  that save's writing waits for that step
{"rank": 1, "step": 2, "fault": "no_space"}  the file system is full from the save of that step on
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from pipeline.cli import main
from pipeline.clip import Losses
from tests.running import wait_for_step

RANK = int(os.environ.get("RANK", "0"))
FAULTS = [
    one for one in json.loads(os.environ["JEPA_TEST_FAULTS"]) if one.get("rank", RANK) == RANK
]


def on_order(fault: str, step: int | None = None) -> dict | None:
    for one in FAULTS:
        if one["fault"] == fault and (step is None or one.get("step", step) == step):
            return one
    return None


def spoil(losses: Losses, step: int) -> Losses:
    total = losses.total
    if on_order("nan", step):
        name = min(losses.terms)
        return replace(
            losses,
            total=total * torch.nan,
            terms={**losses.terms, name: total.detach() * torch.nan},
        )
    if on_order("inf_gradient", step):
        return replace(losses, total=total + (total - total.detach()).sqrt())
    if on_order("spike", step):
        return replace(losses, total=100 * total)
    if on_order("raise", step):
        raise ValueError(f"on order at step {step}")
    return losses


def spoil_loss() -> None:
    from pipeline.engine import zero  # noqa: PLC0415 - not before the launcher has set us up

    build = zero.build_objective

    def build_spoilt(*arguments, **named):
        objective = build(*arguments, **named)
        compute = objective.loss
        objective.loss = lambda batch, progress: spoil(compute(batch, progress), progress.step)
        return objective

    zero.build_objective = build_spoilt


def await_signals() -> Callable[[], None]:
    """What returns when a signal has come since now; no run ends before it has heard of it."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    come = []

    def wait() -> None:
        if not come:
            come.append(os.read(heard, 1))

    return wait


def slow_down() -> None:
    wait_for_signal = await_signals()
    from pipeline.data.loader import Loader  # noqa: PLC0415
    from pipeline.engine.save import RankFiles  # noqa: PLC0415

    write, following = RankFiles.write, Loader.__next__

    def slow_write(self, folder):
        told = on_order("slow_write", self.state["step"])
        time.sleep(told["seconds"] if told else 0)
        late = on_order("late_write", self.state["step"])
        if late:
            run = next(above for above in folder.parents if (above / "run.json").exists())
            wait_for_step(run, late["until"])
        full = on_order("no_space")
        if full and self.state["step"] >= full["step"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "half"))
        return write(self, folder)

    def slow_next(self):
        told = on_order("slow_data")
        time.sleep(told["seconds"] if told else 0)
        batch = following(self)
        if on_order("await_signal", batch.step):
            wait_for_signal()
        self.wait_seconds += told["seconds"] if told else 0
        return batch

    copied = RankFiles.copied

    def slow_copy(self, copies):
        told = on_order("slow_copy", self.state["step"])
        time.sleep(told["seconds"] if told else 0)
        return copied(self, copies)

    RankFiles.write, Loader.__next__ = slow_write, slow_next
    RankFiles.copied = slow_copy


if __name__ == "__main__":
    spoil_loss()
    slow_down()
    sys.exit(main(sys.argv[1:]))
