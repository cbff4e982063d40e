"""Whether all nodes run the same code on the same libraries."""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

import torch
from torch.cuda import nccl

from launch.preflight.finding import Answer, Finding, Situation
from pipeline.machine import code_digest
from pipeline.nvidia import driver_version

NAME = "versions"
_ABSENT = "absent"


def check_versions(_situation: Situation) -> Finding:
    """What this node runs."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": _version("deepspeed"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda or _ABSENT,
        "nccl": _nccl(),
        "driver": driver_version() or _ABSENT,
        "jepa": code_digest(),
    }
    got = ", ".join(f"{name} {value}" for name, value in versions.items() if value != _ABSENT)
    finding = Finding(name=NAME, state="ok", expected="deepspeed", got=got, values=versions)
    if versions["deepspeed"] != _ABSENT:
        return finding
    return finding.worse("fail", "deepspeed is absent", "pip install 'jepa-pipeline[train]'")


def compare_versions(_situation: Situation, answers: Sequence[Answer]) -> Finding:
    """The same on all nodes; the few that differ from the many are named."""
    found = [(one.node, one.of(NAME)) for one in answers]
    versions = [(node, dict(one.values)) for node, one in found if one is not None]
    names = sorted({name for _, values in versions for name in values})
    usual = {
        name: Counter(values.get(name, _ABSENT) for _, values in versions).most_common(1)[0][0]
        for name in names
    }
    odd = {
        node: differing
        for node, values in versions
        if (differing := {n: v for n, v in values.items() if v != usual[n]})
    }
    shown = ", ".join(f"{name} {value}" for name, value in usual.items() if value != _ABSENT)
    finding = Finding(name=NAME, state="ok", expected="the same on all nodes", got=shown)
    if not odd:
        return finding
    words = [
        f"{node} has {name} {value} instead of {usual[name]}"
        for node, values in list(odd.items())[:8]
        for name, value in values.items()
    ]
    worse = finding.worse(
        "fail", "; ".join(words), "Start all nodes from one image or environment, and one checkout."
    )
    return replace(worse, nodes=tuple(odd))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _ABSENT


def _nccl() -> str:
    if not torch.cuda.is_available():
        return _ABSENT
    return ".".join(map(str, nccl.version()))
