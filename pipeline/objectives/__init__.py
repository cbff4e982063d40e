"""The registry of objectives: every module of this folder with a `Config` and an `Objective`.

A new objective is a new file here. Nothing else in the project names one. Files whose name begins
with an underscore are helpers of objectives.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from pipeline.objectives import base


def _modules() -> dict[str, Any]:
    found = [info.name for info in pkgutil.iter_modules(__path__)]
    names = [name for name in found if name != "base" and not name.startswith("_")]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in sorted(names)}


_MODULES = _modules()

if TYPE_CHECKING:
    AnyObjectiveConfig = base.ObjectiveConfig
else:
    _configs = tuple(module.Config for module in _MODULES.values())
    # pydantic takes a discriminator only where there is a choice.
    AnyObjectiveConfig = (
        Annotated[Union[_configs], Field(discriminator="kind")]  # noqa: UP007
        if len(_configs) > 1
        else _configs[0]
    )


def objective_kinds() -> list[str]:
    """Names of all objectives there are."""
    return list(_MODULES)


def build_objective(config: base.ObjectiveConfig, options: base.BuildOptions) -> base.Objective:
    """The objective that `config` belongs to.

    Args:
        config: One of the registered modules' `Config`.
        options: Attention backend and activation checkpointing, decided by the run.
    """
    return _module_of(config).Objective(config, options)


def objective_needs(config: base.ObjectiveConfig) -> frozenset[str]:
    """Members that every sample must have for the objective that `config` belongs to."""
    return _module_of(config).Objective.needs


def _module_of(config: base.ObjectiveConfig) -> Any:
    for module in _MODULES.values():
        if type(config) is module.Config:
            return module
    raise TypeError(f"{type(config).__name__} belongs to no objective in this folder")
