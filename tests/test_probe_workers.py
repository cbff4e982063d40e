"""Features over Ray workers: the same bytes at any number of them, nothing finished is lost."""

import hashlib
import os
import signal
from pathlib import Path

import pytest

from pipeline import cluster
from pipeline.conduct import features
from pipeline.conduct.features import encode_on_workers
from pipeline.conduct.tasks import TaskNeeds
from pipeline.errors import DataError, PeerLostError
from pipeline.probe import chunks
from pipeline.probe.evaluate import run_probe
from pipeline.probe.parts import stored_extractions
from pipeline.probe.records import ProbeRequest
from tests.probe_data import ssv2_task, write_run, write_ssv2

NEEDS = TaskNeeds(num_cpus=1, num_gpus=0, describe="encode a test")
_DIE_ONCE, _DIE_ALWAYS = "die-once", "die-always"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    write_ssv2(folder / "set", train=12, validation=6)
    write_run(folder, (20,))
    with cluster.local_ray(num_cpus=2):
        yield folder


class SmallChunks(features.FeatureWorker):
    """Chunks of four videos; dies over the second one where a file asks for it."""

    def missing(self):
        chunks._MOST_ROWS = 4  # this runs in a process of its own
        return super().missing()

    def encode(self, task):
        chunks._MOST_ROWS = 4
        out = self._request.out
        if (task.split, task.number) == (0, 1):
            if (out / _DIE_ALWAYS).exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if (out / _DIE_ONCE).exists():
                (out / _DIE_ONCE).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(task)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "_MOST_ROWS", 4)
    monkeypatch.setattr(features, "FeatureWorker", SmallChunks)


def test_one_worker_two_and_this_process_leave_the_same_bytes_and_scores(home):
    found, scores = [], []
    for workers in (0, 1, 2):
        request = _request(home, f"with-{workers}")
        if workers:
            assert _encode(request, workers) == 5
        scores.append(_scores(run_probe(request, report=lambda _: None)))
        found.append(_digests(request.out))
    assert len(found[0]) == 10
    assert found[0] == found[1] == found[2]
    assert scores[0] == scores[1] == scores[2]


def test_a_killed_worker_costs_the_chunk_it_was_at_and_no_more(home):
    request = _request(home, "killed")
    request.out.mkdir()
    (request.out / _DIE_ONCE).touch()
    events = []
    assert _encode(request, 2, events.append) == 5
    assert not (request.out / _DIE_ONCE).exists()
    assert (events[-1].done, events[-1].total) == (18, 18)
    whole = _request(home, "undisturbed")
    run_probe(whole, report=lambda _: None)
    assert _digests(request.out) == _digests(whole.out)


def test_what_a_dead_driver_left_is_found_again_and_only_the_rest_encoded(home):
    request = _request(home, "restarted")
    run_probe(request, report=lambda _: None)
    (train, _) = stored_extractions(request)
    lost = train.folder / "chunk-00002.safetensors"
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in request.out.rglob("chunk-*.safetensors")}
    assert _encode(request, 2) == 1
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert lost.exists()
    assert not train.missing()


def test_a_chunk_that_kills_every_worker_ends_the_work_with_its_name(home, monkeypatch):
    monkeypatch.setattr(features, "_MOST_DEATHS", 2)
    request = _request(home, "hopeless")
    request.out.mkdir()
    (request.out / _DIE_ALWAYS).touch()
    with pytest.raises(PeerLostError, match="chunk 1"):
        _encode(request, 1)
    # The chunk before it is whole all the same.
    assert [p.name for p in request.out.rglob("chunk-*.json")] == ["chunk-00000.json"]


def test_an_error_in_a_worker_is_raised_as_it_was(home):
    folder = write_ssv2(home / "broken", train=4, validation=2)
    (folder / "videos" / "2.mp4").write_bytes(b"no video")
    request = _request(home, "broken-out", ssv2_task(folder))
    with pytest.raises(DataError, match="1 of the 4 train videos"):
        _encode(request, 1)


def _encode(request, workers, report=lambda _: None):
    return encode_on_workers(request, workers=workers, needs=NEEDS, report=report)


def _request(home, name, task=None):
    return ProbeRequest(
        source=home / "run" / "checkpoints" / "step-00000020",
        step=20,
        which="teacher",
        task=task or ssv2_task(home / "set"),
        heads=("attentive", "linear", "knn"),
        seeds=(0,),
        out=home / name,
    )


def _digests(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("chunk-*"))
    }


def _scores(records):
    return [(r.head, r.top1, r.curve, r.sweep, r.confusion, r.hardest) for r in records]
