"""What the conductor's configuration means: tasks read, requests made, folders named."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.conduct.jobs import Job, Seen, digest
from pipeline.conduct.settings import ConductConfig, ExportConfig, ProbeConfig
from pipeline.config.load import load_config, resolved_data
from pipeline.errors import ConfigError
from pipeline.exchange.card import CARD_FILE
from pipeline.exchange.transfer import ExportRequest
from pipeline.probe.records import ProbeRequest
from pipeline.probe.task_files import find_task
from pipeline.probe.tasks import TaskConfig
from pipeline.track.folder import PROBE_FOLDER

CONDUCT_FILE = "conduct.yaml"
_EXPORTS = "exports"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedProbe:
    """A probe whose task file has been read."""

    config: ProbeConfig
    task: TaskConfig

    @property
    def version(self) -> str:
        """Of everything that its numbers depend on."""
        told = [resolved_data(self.task), self.config.heads, self.config.seeds]
        return digest(json.dumps(told, sort_keys=True))


def find_config(path: Path | None, runs: Sequence[Path]) -> ConductConfig:
    """The conductor's configuration: the file given, that of the only run, or all defaults.

    Raises:
        UsageError: There is no such file.
        ConfigError: It is wrong; everything that is wrong with it is told.
    """
    if path is None and len(runs) == 1 and (runs[0] / CONDUCT_FILE).is_file():
        path = runs[0] / CONDUCT_FILE
    return ConductConfig() if path is None else load_config(path, ConductConfig).config


def prepare_probes(config: ConductConfig) -> dict[str, PreparedProbe]:
    """Reads all task files.

    Returns:
        Probes by their tasks' names.

    Raises:
        UsageError: A task file is not there.
        ConfigError: One is wrong, or two tasks have one name.
    """
    found: dict[str, PreparedProbe] = {}
    for asked in config.probes:
        task = load_config(find_task(asked.task), TaskConfig, asked.overrides).config
        if task.name in found:
            raise ConfigError(
                f"two probes have the task name {task.name}, by which results are told apart",
                remedy="Give one of them another name: overrides: [name=...].",
            )
        found[task.name] = PreparedProbe(config=asked, task=task)
    return found


def probe_request(run_dir: Path, seen: Seen, probe: PreparedProbe) -> ProbeRequest:
    """What a worker is asked to probe."""
    return ProbeRequest(
        source=seen.path,
        step=seen.step,
        which="teacher",
        task=probe.task,
        heads=probe.config.heads,
        seeds=tuple(range(probe.config.seeds)),
        out=run_dir / PROBE_FOLDER,
    )


def export_request(job: Job, export: ExportConfig) -> ExportRequest:
    """What a worker is asked to export; an earlier export of the same step is replaced."""
    return ExportRequest(
        format="hf" if job.name == "hf" else "safetensors",
        weights=export.weights,
        force=True,
        check=export.check,
        license=export.license,
    )


def export_folder(run_dir: Path, export: ExportConfig, step: int, name: str) -> Path:
    """Where an export goes; its own name tells run and step wherever it is copied to."""
    home = run_dir / _EXPORTS if export.folder is None else export.folder / run_dir.name
    return home / f"{run_dir.name}-step{step:08d}-{name}"


def drop_export(folder: Path) -> bool:
    """Removes an export; true if there was one."""
    if not (folder / CARD_FILE).is_file():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True
