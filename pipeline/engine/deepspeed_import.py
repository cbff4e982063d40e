"""`import deepspeed`, without the libraries that only parts of it want which are not used here.

Its autotuner, imported with everything else, imports all of mlflow where that is installed: as long
as torch itself, on every rank at every start. It goes without where the import fails, so for that
moment mlflow is not to be found. Building an engine imports the optimiser Muon, whose functions
load torch's compiler where they are defined, another second: they are defined as they are.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

import torch

from pipeline.environment import leave_process_group


@contextmanager
def _not_found(name: str) -> Iterator[None]:
    """Lets `import name` fail, unless it has been imported before."""
    if name in sys.modules:
        yield
        return
    # None is the import system's own word for "cannot be imported" (docs of sys.modules).
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _compiling_nothing() -> Iterator[None]:
    """Lets `torch.compile` hand functions back as they are."""
    compile_ = torch.compile
    torch.compile = lambda function, **_options: function
    try:
        yield
    finally:
        torch.compile = compile_


with _not_found("mlflow"):
    import deepspeed
    from deepspeed.utils import groups, logger, safe_get_full_fp32_param, safe_get_local_fp32_param

# Another version may have it elsewhere, and then starts no worse than without this.
with _compiling_nothing(), suppress(ImportError):
    import_module("deepspeed.runtime.zero.muon.original_muon")

__all__ = [
    "deepspeed",
    "groups",
    "leave_groups",
    "logger",
    "safe_get_full_fp32_param",
    "safe_get_local_fp32_param",
]


def leave_groups() -> None:
    """Ends this rank's part in the process group, with DeepSpeed's own notes of it.

    DeepSpeed keeps its clone of the world group for the life of the process; ended behind its
    back, the next engine of the process would be built on a group that is no more.
    """
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    leave_process_group()
