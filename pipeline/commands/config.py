"""`jepa config show | diff | schema`."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pipeline.commands import ConfigPath, JsonFlag, Overrides, print_json, print_text
from pipeline.config.load import load_config
from pipeline.config.report import (
    changes,
    diff_text,
    schema_json,
    schema_text,
    show_data,
    show_text,
)
from pipeline.config.section import Section
from pipeline.run import RunConfig


def show(config: ConfigPath, /, *overrides: Overrides, json: JsonFlag = False) -> None:
    """Every key of a configuration with its value and where that was written.

    Args:
        config: YAML file of the run.
        overrides: key=value laid over the file; list items by position, as stages.0.steps=100.
        json: Print `config` and `origins` as JSON.
    """
    loaded = load_config(config, RunConfig, overrides)
    if json:
        print_json(show_data(loaded))
    else:
        print_text(show_text(loaded))


def diff(left: Path, right: Path, /, *, json: JsonFlag = False) -> None:
    """Keys in which two configurations differ, defaults included, with both values.

    Args:
        left: YAML file of a run.
        right: YAML file to compare it with.
        json: Print a list of `key`, `left` and `right` as JSON.
    """
    found = changes(load_config(left, RunConfig).config, load_config(right, RunConfig).config)
    if json:
        print_json([asdict(change) for change in found])
    else:
        print_text(diff_text(found, str(left), str(right)))


def schema(
    *, of: Literal["run", "probe", "conduct", "cluster"] = "run", json: JsonFlag = False
) -> None:
    """Every key a configuration can have: what it takes, its default and what it does.

    Args:
        of: Whose file: that of a run, of a probe's task, of the conductor, or of plan's --cluster.
        json: Print the JSON Schema, for editors.
    """
    section = _section(of)
    if json:
        print_json(schema_json(section))
    else:
        print_text(schema_text(section))


def _section(of: str) -> type[Section]:
    if of == "probe":
        from pipeline.probe.tasks import TaskConfig  # noqa: PLC0415 - only where it is asked for

        return TaskConfig
    if of == "conduct":
        from pipeline.conduct.settings import ConductConfig  # noqa: PLC0415 - as above

        return ConductConfig
    if of == "cluster":
        from pipeline.plan.cluster import Cluster  # noqa: PLC0415 - as above

        return Cluster
    return RunConfig
