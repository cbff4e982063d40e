"""The files of a run's folder that trackers, status and report share."""

# Imports no torch: the process that uploads to MLflow should cost the machine little.
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.files import write_atomically
from pipeline.redact import without_secrets

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SYSTEM_FILE = "system.jsonl"
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
STOP_FILE = "stop"
QUARANTINE_FILE = "quarantine.jsonl"
MLFLOW_FILE = "mlflow.json"
PROBE_FOLDER = "probes"
PROBE_PICTURES = "pictures"
REPORT_FILE = "report.html"

_NOT_OURS = "Restore the file from a copy, or move it away if the run can do without it."


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeScore:
    """One file of the probe folder; accuracies are shares between 0 and 1."""

    name: str
    task: str
    head: str
    """With ` (student)` behind it where not the teacher was probed: their scores do not compare."""
    step: int | None
    """Training step of the probed checkpoint; 0 for the untrained encoder."""
    trained: bool
    top1: float
    top5: float | None
    interval: tuple[float, float] | None
    """95 % interval of top1, as wide as the number of validation clips makes it."""
    chance: float | None
    num_val: int | None
    seed: int | None
    written: float
    """When the file was written, unix seconds."""


def read_run_info(run_dir: Path) -> dict[str, Any]:
    """The content of run.json; empty if there is none yet.

    Raises:
        StorageError: If the file is there but holds something else.
    """
    path = run_dir / RUN_FILE
    info = read_json_object(path)
    try:
        for start in info.get("starts", []):
            datetime.fromisoformat(start["time"])
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{path}: expected `starts` as a list of starts with their times, got another thing "
            f"({error}).",
            remedy=_NOT_OURS,
        ) from None
    return info


def update_run_info(run_dir: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sets some keys of run.json and keeps the others; for the run's first rank alone.

    Returns:
        The new content.
    """
    info = {**read_run_info(run_dir), **changes}
    write_json(run_dir / RUN_FILE, info)
    return info


def start_times(run_dir: Path) -> tuple[float, ...]:
    """When the run's processes were started, unix seconds: before they had loaded anything."""
    starts = read_run_info(run_dir).get("starts", [])
    return tuple(datetime.fromisoformat(start["time"]).timestamp() for start in starts)


def read_json_object(path: Path) -> dict[str, Any]:
    """A small JSON file; empty if it is not there.

    Raises:
        StorageError: If it cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot read {path}: {error}", remedy=_NOT_OURS) from error
    if not isinstance(content, dict):
        raise StorageError(
            f"Expected a JSON object in {path}, got {type(content).__name__}.", remedy=_NOT_OURS
        )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a small JSON file whole, so that no reader meets half of it.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    try:
        text = json.dumps(without_secrets(content), indent=1, ensure_ascii=False, default=str)
        write_atomically(path, text)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error}") from error


def read_probes(run_dir: Path) -> tuple[ProbeScore, ...]:
    """All probe scores, oldest checkpoint first.

    Raises:
        StorageError: If a file of the probe folder is no probe result.
    """
    paths = sorted((run_dir / PROBE_FOLDER).glob("*.json"))
    scores = [_probe_score(path, record) for path in paths for record in probe_records(path)]
    return tuple(sorted(scores, key=lambda score: (score.step or 0, score.name)))


def probe_records(path: Path) -> list[dict[str, Any]]:
    """The scores of one file of the probe folder, each with what they all share.

    A file holds the scores of one checkpoint and task under `scores`; those of earlier versions
    hold one score each.

    Raises:
        StorageError: If it is no probe result.
    """
    content = read_json_object(path)
    scores = content.pop("scores", None)
    records = [content] if scores is None else [{**content, **score} for score in scores]
    if not all(isinstance(record.get("top1"), int | float) for record in records):
        raise StorageError(
            f"{path} is no probe result: it has no number `top1`.",
            remedy="Move the file away; `jepa probe` writes that of a checkpoint again.",
        )
    for record in records:
        ending = f"-{record.get('head')}-seed{record.get('seed')}"
        record["name"] = path.stem if scores is None else f"{path.stem}{ending}"
    return records


def _probe_score(path: Path, record: dict[str, Any]) -> ProbeScore:
    step = record.get("step")
    untrained = step == 0 or str(record.get("which")) == "untrained"
    is_student = record.get("which") == "student"
    return ProbeScore(
        name=record["name"],
        task=str(record.get("task", "task")),
        head=f"{record.get('head', 'head')}{' (student)' if is_student else ''}",
        step=step,
        trained=not untrained,
        top1=float(record["top1"]),
        top5=record.get("top5"),
        interval=tuple(record["top1_interval"]) if "top1_interval" in record else None,
        chance=record.get("chance"),
        num_val=record.get("num_val"),
        seed=record.get("seed"),
        written=path.stat().st_mtime,
    )
