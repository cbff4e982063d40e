"""What a run's folder tells of how a checkpoint came about, for the model card."""

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from pipeline.checkpoint.load import read_state
from pipeline.config.load import load_config
from pipeline.exchange.source import Source
from pipeline.run import RunConfig
from pipeline.track.folder import CONFIG_FILE, PROBE_FOLDER, probe_records, read_run_info
from pipeline.track.metrics import read_all_metrics, without_superseded


def training_facts(source: Source) -> dict[str, Any] | None:
    """Stages, data, tokens and probe scores of the source's training; None if it tells nothing.

    Plain JSON data: an exchange folder keeps it, so that it outlives the run's folder.
    """
    if source.commit_dir is None:
        return source.provenance.get("training")
    run_dir = source.commit_dir.parent.parent
    config = load_config(run_dir / CONFIG_FILE, RunConfig).config
    step = int(source.provenance["step"])
    info = read_run_info(run_dir)
    taken = [
        logged.report
        for logged in without_superseded(read_all_metrics(run_dir))
        if logged.report.step <= step
    ]
    return {
        "run": config.name,
        "step": step,
        "num_steps": config.num_steps,
        "global_batch": config.global_batch,
        "precision": config.precision,
        "stages": _stages(config, step),
        "sources": _sources(read_state(source.commit_dir), config),
        "clips_seen": sum(report.clips for report in taken),
        "tokens_seen": sum(report.tokens for report in taken),
        "code": [start.get("code") for start in info.get("starts", [])][-1:],
        "base_model": info.get("init_from"),
        "probes": _probes(
            record for path in _probe_files(source, step) for record in probe_records(path)
        ),
    }


def last_name(path: object) -> str:
    """A folder's own name: where it lies is nobody's business but its owner's."""
    return str(path).rstrip("/").rpartition("/")[2]


def _stages(config: RunConfig, step: int) -> list[dict[str, Any]]:
    rows, left = [], step
    for stage in config.stages:
        rate = stage.learning_rate
        rows.append(
            {
                "name": stage.name,
                "frames": stage.frames,
                "fps": stage.fps,
                "resolution": stage.resolution,
                "steps": max(0, min(stage.steps, left)),
                "of_steps": stage.steps,
                "peak_learning_rate": rate.peak,
            }
        )
        left -= stage.steps
    return rows


def _sources(state: Mapping[str, Any], config: RunConfig) -> list[dict[str, Any]]:
    told = state.get("data", {}).get("sources", [])
    if not told:
        return [{"name": last_name(source.path)} for source in config.data.sources]
    return [
        {
            "name": last_name(one["path"]),
            "digest": one["digest"],
            "samples": one["num_samples"],
            "weight": one["weight"],
        }
        for one in told
    ]


def _probe_files(source: Source, step: int) -> list[Any]:
    if source.commit_dir is None:
        return []
    folder = source.commit_dir.parent.parent / PROBE_FOLDER
    return sorted(folder.glob(f"*-step{step:08d}-*.json"))


def _probes(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = (str(record["task"]), str(record["head"]), str(record.get("which", "")))
        groups.setdefault(key, []).append(record)
    return [
        {
            "task": task,
            "head": head,
            "which": which,
            "top1": mean(float(one["top1"]) for one in group),
            "seeds": len(group),
            "chance": group[0].get("chance"),
            "num_val": group[0].get("num_val"),
            "rule": group[0].get("rule", ""),
            "clip": group[0].get("task_config", {}).get("clip", {}),
        }
        for (task, head, which), group in sorted(groups.items())
    ]
