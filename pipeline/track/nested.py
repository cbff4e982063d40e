"""Probe scores as MLflow shall have them: one nested run per checkpoint and task."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.track.folder import MLFLOW_FILE, ProbeScore, read_json_object, read_probes


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedRun:
    """What one nested run holds."""

    task: str
    step: int | None
    scores: tuple[ProbeScore, ...]

    @property
    def key(self) -> str:
        """Names it in the run's mlflow.json and in MLflow's tags."""
        return nested_key(self.task, self.step)

    @property
    def name(self) -> str:
        """What MLflow shows."""
        kind = "imported" if self.step is None else f"step {self.step}"
        return f"{self.task} · {kind}"

    @property
    def digest(self) -> str:
        """Changes when a score does: a probe that was done again is recorded again."""
        told = [(s.name, s.head, s.seed, s.top1, s.top5, s.num_val) for s in self.scores]
        return hashlib.sha256(json.dumps(sorted(told, key=str)).encode()).hexdigest()[:16]


def nested_key(task: str, step: int | None) -> str:
    """Names the nested run of a task and a checkpoint."""
    return f"{task}@{'imported' if step is None else step}"


def nested_runs(run_dir: Path) -> list[NestedRun]:
    """All nested runs that a run's probe scores make.

    Raises:
        StorageError: If a file of the probe folder is no probe result.
    """
    found: dict[tuple[str, int | None], list[ProbeScore]] = {}
    for score in read_probes(run_dir):
        found.setdefault((score.task, score.step), []).append(score)
    return [
        NestedRun(task=task, step=step, scores=tuple(scores))
        for (task, step), scores in found.items()
    ]


def recorded_runs(run_dir: Path) -> Mapping[str, Mapping[str, str]]:
    """Key → `run_id` and `digest` of the nested runs that MLflow has."""
    found = read_json_object(run_dir / MLFLOW_FILE).get("nested", {})
    return found if isinstance(found, dict) else {}


def is_recorded(run_dir: Path, task: str, step: int | None) -> bool:
    """Whether MLflow has the scores of a checkpoint on a task as they are now."""
    recorded = recorded_runs(run_dir).get(nested_key(task, step))
    wanted = [run for run in nested_runs(run_dir) if run.key == nested_key(task, step)]
    return recorded is not None and [recorded.get("digest")] == [run.digest for run in wanted]
