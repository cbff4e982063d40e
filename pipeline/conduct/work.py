"""What workers do with one checkpoint; every function may be done again with the same outcome.

Each takes plain values and a keyword `report`, and returns what goes into the journal.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoint import layout
from pipeline.checkpoint.inspect import tensor_problems
from pipeline.checkpoint.load import verify
from pipeline.checkpoint.reshard import CommitTensors
from pipeline.checkpoint.store import CommitStore
from pipeline.errors import StorageError
from pipeline.exchange.open import open_networks
from pipeline.exchange.transfer import ExportRequest, export_networks
from pipeline.probe.evaluate import run_probe
from pipeline.probe.records import ProbeRequest
from pipeline.report.facts import gather
from pipeline.report.page import write_report
from pipeline.track.folder import read_probes
from pipeline.track.metrics import RunStatus, TrackConfig
from pipeline.track.mlflow_sink import MlflowSink

_RECORDS = ("config.yaml", "run.json")
Report = Callable[[Any], None]


def verify_checkpoint(commit_dir: Path, run_id: str | None, *, report: Report) -> dict[str, Any]:
    """Every byte against its digest, every tensor against its fingerprint.

    Returns:
        `problems`, `mib`, and where all is well and there is a teacher `teacher_distance`:
        |teacher − student| / |student| over the encoder's weights.
    """
    report("comparing digests")
    problems = verify(commit_dir, run_id=run_id) or tensor_problems(commit_dir)
    if problems:
        return {"problems": problems}
    manifest = layout.read_manifest(commit_dir)
    mib = sum(entry.num_bytes for entry in manifest.files) / 2**20
    found: dict[str, Any] = {"problems": [], "mib": round(mib, 1)}
    distance = _teacher_distance(commit_dir)
    return found if distance is None else {**found, "teacher_distance": distance}


def mirror_checkpoint(
    commit_dir: Path, url: str, newest_step: int, *, report: Report
) -> dict[str, Any]:
    """Brings a checkpoint to another place; its manifest goes last and makes it one there.

    Args:
        commit_dir: A verified commit.
        url: Below which the run's folder lies there.
        newest_step: Newest that the run has: later ones there are of a line that a resume left.
        report: Told files done.

    Raises:
        StorageError: The place refuses, or holds another run of this name.
    """
    run_dir = commit_dir.parent.parent
    store, manifest = CommitStore(url, run_dir.name), layout.read_manifest(commit_dir)
    owner = store.run_id()
    if owner not in (None, manifest.run_id):
        raise StorageError(
            f"{store.url} holds checkpoints of another run, {owner}; nothing was written there.",
            remedy="Choose another mirror.url in the conductor's configuration.",
        )
    where = f"{store.url}/{commit_dir.name}"
    store.set_aside_from(newest_step + 1)
    if manifest.step in store.steps():
        if store.manifest(manifest.step) == manifest:
            return {"path": where, "found": True}
        store.clear(manifest.step)
    for name in _RECORDS:
        if (run_dir / name).is_file():
            store.write(name, (run_dir / name).read_bytes())
    for number, entry in enumerate(manifest.files, 1):
        store.put(manifest.step, entry.path, commit_dir / entry.path)
        report(f"{number} of {len(manifest.files)} files")
    store.mark(manifest.step, (commit_dir / layout.MANIFEST).read_bytes())
    return {"path": where}


def unmirror_checkpoint(run_dir: Path, url: str, step: int, *, report: Report) -> dict[str, Any]:
    """Removes a checkpoint from the mirror, unless that step stands in the run's folder again."""
    store = CommitStore(url, run_dir.name)
    report("removing")
    if all(commit.step != step for commit in layout.list_commits(run_dir)):
        store.clear(step)
    return {"path": f"{store.url}/{layout.commit_name(step)}"}


def export_checkpoint(
    commit_dir: Path, out: Path, request: ExportRequest, *, report: Report
) -> dict[str, Any]:
    """Writes a checkpoint's networks for others; replaces only what an export made."""
    source = open_networks(commit_dir, verify=False)
    exported = export_networks(source, out, request, lambda done, total: report((done, total)))
    found: dict[str, Any] = {"path": str(out)}
    if exported.difference is not None:
        found["difference"] = exported.difference.encoder
    return found


def probe_checkpoint(request: ProbeRequest, *, report: Report) -> dict[str, Any]:
    """Scores a checkpoint on a task; the results lie in the run's `probes` as of `jepa probe`.

    Returns:
        `scores`: mean top-1 by head.
    """
    run_probe(request, report=report)
    found: dict[str, list[float]] = {}
    for score in read_probes(request.out.parent):
        if score.task == request.task.name and score.step == request.step:
            found.setdefault(score.head, []).append(score.top1)
    return {"scores": {head: math.fsum(all_) / len(all_) for head, all_ in sorted(found.items())}}


def record_scores(
    run_dir: Path, track: TrackConfig, status: RunStatus, *, report: Report
) -> dict[str, Any]:
    """Sends what MLflow has not got yet of a run that nobody owns.

    Raises:
        StorageError: MLflow did not take everything.
    """
    report("sending")
    sink = MlflowSink(track, run_dir, is_training=False)
    warning = sink.start() or sink.close(status, is_urgent=False)
    if warning is not None:
        raise StorageError(warning, remedy="Check track.mlflow.tracking_uri and its server.")
    return {}


def update_report(run_dir: Path, *, with_page: bool, report: Report) -> dict[str, Any]:
    """Judges the run again, and writes its report, without feature maps.

    Returns:
        `state`, `keep` and `text` of the verdict.
    """
    report("judging")
    judged = gather(run_dir).verdict
    if with_page:
        write_report(run_dir)
    return {"state": judged.state, "keep": judged.keep.step, "text": judged.text}


def _teacher_distance(commit_dir: Path) -> float | None:
    """How far the averaged encoder is from the one that learns, relative to the latter."""
    apart = size = 0.0
    with CommitTensors(commit_dir, with_optimizer=False) as tensors:
        names = set(tensors.names())
        for name in sorted(names):
            student = f"encoder.{name.removeprefix('teacher.')}"
            if not name.startswith("teacher.") or student not in names:
                continue
            ours = tensors.whole(student).double()
            apart += float((tensors.whole(name).double() - ours).square().sum())
            size += float(ours.square().sum())
    return math.sqrt(apart / size) if size > 0 else None
