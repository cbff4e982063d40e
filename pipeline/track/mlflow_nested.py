"""Probe scores in MLflow: points of the training run, and nested runs below it.

Part of the uploading process, which is the only one that writes a run's MLflow: a database file has
one writer, and a nested run is made once whoever asks for it.
"""

from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

from pipeline.track.folder import PROBE_FOLDER, ProbeScore, read_probes
from pipeline.track.mlflow_points import mlflow_name, points
from pipeline.track.nested import NestedRun, nested_runs

_PARENT_TAG, _KEY_TAG, _DIGEST_TAG = "mlflow.parentRunId", "jepa.probe", "jepa.probe.digest"
Known = dict[str, dict[str, str]]


class ProbeSender:
    """Sends what is new in a run's probe folder.

    Args:
        run_dir: Folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._seen: frozenset[tuple[str, int]] = frozenset()

    def send(
        self,
        client: MlflowClient,
        run_id: str,
        sent: list[str],
        nested: Known,
        save: Callable[[], None],
    ) -> None:
        """Sends scores as points of the training run and as nested runs.

        Args:
            client: Of the run's MLflow.
            run_id: The training run.
            sent: Names of scores that it has as points; grows.
            nested: Nested runs it has, by their key; grows.
            save: Called after each that was sent.
        """
        files = (self._run_dir / PROBE_FOLDER).glob("*.json")
        there = frozenset((path.name, path.stat().st_mtime_ns) for path in files)
        if there == self._seen:
            return
        for probe in read_probes(self._run_dir):
            if probe.name not in sent:
                kind = "trained" if probe.trained else "untrained"
                values = {f"probe/{probe.task}/{probe.head}/{kind}_top1": probe.top1}
                client.log_batch(run_id, list(points(values, probe.written, probe.step or 0)))
                sent.append(probe.name)
                save()
        for run in nested_runs(self._run_dir):
            if nested.get(run.key, {}).get("digest") != run.digest:
                nested[run.key] = {"run_id": self._record(client, run_id, run)}
                nested[run.key]["digest"] = run.digest
                save()
        self._seen = there

    def _record(self, client: MlflowClient, parent: str, run: NestedRun) -> str:
        """Makes or finds the nested run and brings it up to date; gives its id."""
        experiment = client.get_run(parent).info.experiment_id
        # Found again if a crash came between making it and writing down its id.
        wanted = f"tags.`{_PARENT_TAG}` = '{parent}' and tags.`{_KEY_TAG}` = '{_tag(run)}'"
        found = client.search_runs([experiment], wanted, max_results=1)
        if found and found[0].data.tags.get(_DIGEST_TAG) == run.digest:
            return found[0].info.run_id
        if found:
            made = found[0].info.run_id
        else:
            tags = {_PARENT_TAG: parent, _KEY_TAG: _tag(run), "mlflow.source.name": "jepa"}
            tags |= {"jepa.task": run.task, "jepa.step": str(run.step)}
            name = mlflow_name(run.name.replace("·", "-"))
            made = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        for score in run.scores:
            written = points(_values(score), score.written, run.step or 0)
            client.log_batch(made, metrics=list(written))
        for path in sorted((self._run_dir / PROBE_FOLDER).glob("*.json")):
            # A file holds one score, or all of a checkpoint and task, which begin with its name.
            if any(score.name.startswith(path.stem) for score in run.scores):
                client.log_artifact(made, str(path))
        # Last: without it, what a crash left half sent is sent again.
        client.set_tag(made, _DIGEST_TAG, run.digest)
        client.set_terminated(made, "FINISHED")
        return made


def _values(score: ProbeScore) -> dict[str, float | None]:
    low, high = score.interval or (None, None)
    told = {"top1": score.top1, "top5": score.top5, "top1_low": low, "top1_high": high}
    told |= {"chance": score.chance, "num_val": score.num_val}
    seed = "" if not score.seed else f"/seed{score.seed}"
    return {f"{score.head}{seed}/{name}": value for name, value in told.items()}


def _tag(run: NestedRun) -> str:
    # A quote would end the search for it too early.
    return run.key.replace("'", "_")
