"""Puts planned faults into a rank of a run under test; nothing of it is in the product.

Python imports this by itself where the harness has put its folder on PYTHONPATH. JEPA_FAULTS holds
a list of faults, each `{rank, phase, step, deed, flag}`: when that rank first comes to that phase
at or after that step, the deed is done, once for all attempts of a run (`flag` is the file that
says so). Phases come from two places that the product passes anyway: the word it gives its own
watchdog, and Python's audit events of the files it opens, renames and removes.
"""

import importlib.abc
import importlib.machinery
import json
import os
import resource
import signal
import sys
import time

WATCHDOG = "pipeline.engine.hang"
PHASES = {"data": "load", "compute": "forward", "agree": "agree", "update": "step", "log": "log"}


class Faults:
    """The faults of this process."""

    def __init__(self, planned):
        self.planned = planned
        self.step = -1

    def come_to(self, phase):
        for fault in self.planned:
            if fault["phase"] == phase and self.step >= fault["step"] and first(fault["flag"]):
                DEEDS[fault["deed"].partition(":")[0]](fault["deed"].partition(":")[2])

    def audit(self, event, arguments):
        """Which phase of a save a file operation belongs to."""
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
            is_write = set("wax+") & set(arguments[1])
            if is_write and "/checkpoints/" in arguments[0]:
                self.come_to("write")
        elif event == "os.rename" and "/checkpoints/" in str(arguments[0]):
            self.come_to("commit")
        elif event == "shutil.rmtree" and "/checkpoints/" in str(arguments[0]):
            self.come_to("prune")


def first(flag):
    """Whether this is the first time, over all processes and attempts."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def pause(_):
    os.kill(os.getpid(), signal.SIGSTOP)


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


def sleep(seconds):
    time.sleep(float(seconds))


def fill(num_bytes):
    """From now on no file grows beyond this: a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(num_bytes), resource.RLIM_INFINITY))


def kill_worker(_):
    """Kills one loader worker: a child of multiprocessing's fork server."""
    import psutil  # noqa: PLC0415 - this runs before anything else of the process

    for process in psutil.Process().children(recursive=True):
        parent = process.parent()
        if parent is not None and any("forkserver" in word for word in parent.cmdline()):
            process.kill()
            return
    raise RuntimeError("there is no loader worker to kill")


DEEDS = {
    **{"kill": kill, "stop": pause, "send": send, "sleep": sleep, "fill": fill},
    "kill_worker": kill_worker,
}


class Wrapper(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the watchdog's module be imported, then listens to what it is told."""

    def __init__(self, faults):
        self.faults = faults
        self.inner = None

    def find_spec(self, name, path, target=None):
        if name != WATCHDOG:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        self.inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        self.inner.exec_module(module)
        listen(module.Watchdog, self.faults)


def listen(watchdog, faults):
    begin, enter = watchdog.begin, watchdog.enter

    def beginning(self, unit, step, **options):
        begin(self, unit, step, **options)
        if unit == "step":
            faults.step = step
            faults.come_to("load")
            wrap_backward(faults)

    def entering(self, phase):
        enter(self, phase)
        faults.come_to(PHASES.get(phase, phase))

    watchdog.begin, watchdog.enter = beginning, entering


def wrap_backward(faults):
    import torch  # noqa: PLC0415 - here it is imported already

    backward = torch.Tensor.backward
    if getattr(backward, "is_listening", False):
        return

    def listening(self, *arguments, **options):
        faults.come_to("backward")
        return backward(self, *arguments, **options)

    listening.is_listening = True
    torch.Tensor.backward = listening


def install():
    planned = json.loads(os.environ.get("JEPA_FAULTS", "[]"))
    rank = int(os.environ.get("RANK", "0"))
    # Loader workers, their server and the launcher carry the same variables.
    if planned and sys.orig_argv[1:3] == ["-m", "pipeline.cli"]:
        faults = Faults([fault for fault in planned if fault["rank"] == rank])
        sys.meta_path.insert(0, Wrapper(faults))
        sys.addaudithook(faults.audit)


install()
