"""The conductor beside a live training run: stopped, killed, its worker killed, started again.

One story, told by the fixture; the tests look at what it left behind.
"""

import json
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.checkpoint.layout import list_commits
from pipeline.checkpoint.load import find_commit, verify
from pipeline.checkpoint.mirror import restore
from pipeline.checkpoint.store import CommitStore
from pipeline.cluster import local_ray
from pipeline.exchange.layout import read_exchange
from pipeline.report.facts import gather
from pipeline.track.folder import read_probes, update_run_info
from pipeline.track.journal import read_journal
from pipeline.track.jsonl import JsonLinesWriter
from pipeline.track.mlflow_sink import mlflow_run_id
from tests.probe_data import write_run, write_ssv2
from tests.running import finish, jepa, long_stage, wait_until, write_config
from tests.shards import write_dataset

# A loaded machine takes many times as long for what follows.
pytestmark = pytest.mark.timeout(1800)
STEPS, EVERY = 120, 40
LIMIT_SECONDS = 600


@dataclass
class Story:
    """What happened."""

    folder: Path
    codes: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def live(self) -> Path:
        return self.folder / "live"

    @property
    def ended(self) -> Path:
        return self.folder / "ended"

    def conduct(self, *words: object):
        config = self.folder / "conduct.yaml"
        return jepa("conduct", self.live, self.ended, "--config", config, *words)

    def wait_for_lines(self, event: str, count: int) -> None:
        def is_there():
            entries = [*read_journal(self.live), *read_journal(self.ended)]
            return sum(entry.event == event for entry in entries) >= count

        wait_until(is_there, f"{count} lines {event}", LIMIT_SECONDS)

    def note(self, name: str, process) -> None:
        self.codes[name], self.outputs[name] = finish(process, LIMIT_SECONDS)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    story = Story(tmp_path_factory.mktemp("conduct"))
    prepare(story.folder)
    training = jepa("train", story.folder / "live.yaml")
    wait_until(lambda: bool(list_commits(story.live)), "the first checkpoint", LIMIT_SECONDS)

    first = story.conduct()
    story.wait_for_lines("done", 2)
    first.send_signal(signal.SIGTERM)
    story.note("stopped", first)

    third = story.conduct()
    story.wait_for_lines("done", 6)
    kill_tree(third)
    story.note("killed", third)

    fourth = story.conduct()
    kill_a_worker(fourth)
    story.note("ended", fourth)
    story.note("training", training)
    story.note("again", story.conduct("--once", "--json"))
    return story


def prepare(folder):
    """A run to be trained, one that has ended, a task, and what is to be done."""
    write_ssv2(folder / "set", train=9, validation=6)
    write_dataset(folder / "data", 12)
    stage = long_stage(steps=STEPS)
    track = {"health_every_steps": 20, "mlflow": {"enabled": True, "system_metrics": False}}
    # Kept by the run for the conductor, which frees them when everything is done with them.
    checkpoint = {"every_steps": EVERY, "keep_last": 1, "keep_every_steps": EVERY}
    write_config(folder, "live", stages=stage, track=track, checkpoint=checkpoint)
    write_run(folder, (0, 3, 6)).rename(folder / "ended")
    update_run_info(folder / "ended", {"run_id": "r"})
    events = JsonLinesWriter(folder / "ended" / "events.jsonl")
    events.write({"time": time.time(), "event": "end", "step": 6, "reason": "all stages are done"})
    damage(folder / "ended" / "checkpoints" / "step-00000003" / "weights-rank00000.safetensors")
    (folder / "task.yaml").write_text(
        f"""
name: squares
data: {{kind: ssv2, videos: {folder}/set/videos, annotations: {folder}/set/labels}}
clip: {{frames: 4, fps: 4.0, resolution: 32, views: 1}}
linear: {{learning_rates: [0.01], epochs: 3}}
"""
    )
    asked = {
        "mirror": {"url": f"file://{folder}/mirror"},
        "export": {"formats": ["safetensors", "hf"], "check": False},
        "probes": [{"task": str(folder / "task.yaml"), "heads": ["linear", "knn"]}],
        "retention": {"best_by": "squares/linear", "keep_every_steps": 10_000},
        "ray": {"num_cpus": 1},
        "nice": 0,
        "poll_seconds": 0.3,
        "retry_seconds": 0.1,
        "jobs_at_once": 2,
    }
    (folder / "conduct.yaml").write_text(json.dumps(asked))


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(bytes(content))


def kill_tree(driver):
    """SIGKILL for the driver alone: what works for it has to go by itself.

    Ray's agents do no work; they notice once a minute that they are alone.
    """
    children = psutil.Process(driver.pid).children(recursive=True)
    children = [child for child in children if "Agent" not in " ".join(child.cmdline())]
    driver.kill()
    _, alive = psutil.wait_procs(children, timeout=LIMIT_SECONDS)
    assert alive == []


def kill_a_worker(driver):
    """SIGKILL for a worker in the middle of a job."""

    def at_work():
        for process in psutil.Process(driver.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and " step " in title:
                    process.kill()
                    return True
            except psutil.NoSuchProcess:
                continue
        return False

    wait_until(at_work, "a worker at work", LIMIT_SECONDS)


def of_event(run, event):
    return [entry for entry in read_journal(run) if entry.event == event]


def test_training_came_to_its_end_and_every_conductor_ended_with_its_own_code(story):
    assert story.codes["training"] == 0, story.outputs["training"][-2000:]
    assert story.codes["stopped"] == 75, story.outputs["stopped"][-2000:]
    assert story.codes["killed"] == -signal.SIGKILL
    # 78: a checkpoint is damaged, so a person has to look.
    assert story.codes["ended"] == 78, story.outputs["ended"][-3000:]
    assert story.codes["again"] == 78


def test_every_job_of_every_checkpoint_is_done_exactly_once(story):
    for run in (story.live, story.ended):
        done = Counter(entry.key for entry in of_event(run, "done"))
        assert set(done.values()) == {1}, [key for key, count in done.items() if count > 1]
    steps = set(range(0, STEPS + 1, EVERY))
    done = of_event(story.live, "done")
    for kind in ("verify", "mirror", "export:hf", "export:safetensors", "probe", "record"):
        assert {e.step for e in done if e.key.startswith(kind)} == steps, kind
    assert of_event(story.live, "given_up") == []


def test_the_journal_tells_why_and_ends_where_it_began(story):
    entries = read_journal(story.live)
    for entry in entries:
        if entry.event == "begin":
            assert entry.details["why"]
    begun = Counter(entry.key for entry in entries if entry.event == "begin")
    ended = {entry.key for entry in entries if entry.event in ("done", "failed")}
    assert set(begun) <= ended
    starts = [entry.event for entry in entries if entry.event in ("start", "stop")]
    assert starts == ["start", "stop", "start", "start", "stop", "start", "stop"]
    again = entries[max(i for i, e in enumerate(entries) if e.event == "start") :]
    assert [entry.event for entry in again] == ["start", "stop"]


def test_a_killed_worker_is_noted_and_its_job_is_done_again(story):
    lost = [
        entry
        for run in (story.live, story.ended)
        for entry in of_event(run, "failed")
        if "was lost" in entry.details["reason"]
    ]
    assert len(lost) == 1
    run = story.live if lost[0] in of_event(story.live, "failed") else story.ended
    assert lost[0].key in {entry.key for entry in of_event(run, "done")}


def test_a_damaged_checkpoint_is_named_and_left_alone(story):
    (found,) = of_event(story.ended, "damaged")
    assert found.step == 3
    assert "weights-rank00000.safetensors" in found.details["reason"]
    assert {entry.step for entry in of_event(story.ended, "done")} == {0, 6}
    assert "step 3: verify damaged" in "".join(story.outputs.values())
    assert "Damaged checkpoints, step 3" in gather(story.ended).verdict.text


def test_what_is_kept_is_the_first_the_best_and_the_newest(story):
    scores = {p.step: p.top1 for p in read_probes(story.live) if p.head == "linear" and p.step}
    best = max(scores, key=lambda step: (scores[step], step))
    assert {commit.step for commit in list_commits(story.live)} == {0, best, STEPS}
    removed = {entry.step for entry in of_event(story.live, "removed")}
    assert removed <= set(range(EVERY, STEPS, EVERY)) - {best}
    # What the run's owner removed for it while it trained is only noted as gone.
    for entry in of_event(story.live, "removed"):
        assert "freed by retention.keep_every_steps" in entry.details["reason"]
    assert {entry.step for entry in of_event(story.live, "gone")} >= removed
    exports = {path.name for path in (story.live / "exports").iterdir()}
    kept = sorted({0, best, STEPS})
    kinds = ("hf", "safetensors")
    assert exports == {f"live-step{step:08d}-{kind}" for step in kept for kind in kinds}


def test_the_mirror_holds_whole_checkpoints_from_which_a_run_comes_back(story, tmp_path):
    store = CommitStore(f"file://{story.folder}/mirror", "live")
    assert store.steps() == list(range(0, STEPS + 1, EVERY))
    restored = restore(store, tmp_path / "live")
    assert (restored.step, restored.rejected) == (STEPS, ())
    ours, theirs = (find_commit(run, STEPS) for run in (story.live, tmp_path / "live"))
    assert ours.manifest == theirs.manifest
    assert verify(theirs.commit.path) == []


def test_exports_tell_of_which_run_and_step_they_are(story):
    folder = story.live / "exports" / f"live-step{STEPS:08d}-safetensors"
    provenance = read_exchange(folder).provenance
    assert (provenance["step"], provenance["run"]) == (STEPS, "live")


def test_mlflow_has_one_nested_run_per_checkpoint_and_task(story):
    client = MlflowClient(f"sqlite:///{story.folder / 'mlflow.db'}")
    parent = client.get_run(mlflow_run_id(story.live))
    wanted = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    found = client.search_runs([parent.info.experiment_id], wanted)
    tags = sorted(int(one.data.tags["jepa.step"]) for one in found)
    assert tags == list(range(0, STEPS + 1, EVERY))
    assert parent.info.status == "FINISHED"
    scores = {p.step: p.top1 for p in read_probes(story.live) if p.head == "linear"}
    for one in found:
        step = int(one.data.tags["jepa.step"])
        assert one.data.metrics["linear/top1"] == pytest.approx(scores[step])


def test_the_verdict_and_the_report_name_the_step_to_keep(story):
    verdict = of_event(story.live, "verdict")[-1]
    assert verdict.details["keep"] == gather(story.live).verdict.keep.step
    page = (story.live / "report.html").read_text()
    assert f"Keep step {verdict.details['keep']}" in page
    told = json.loads(
        story.outputs["again"][story.outputs["again"].index("{") :].rsplit("}", 1)[0] + "}"
    )
    assert (told["num_open"], told["num_lost"], told["stopped_by"]) == (0, 1, None)


def test_a_cluster_that_runs_already_is_joined_and_left_running(tmp_path):
    run = write_run(tmp_path, (0, 4))
    update_run_info(run, {"run_id": "r"})
    with local_ray(num_cpus=1, num_gpus=0) as ray:
        address = ray.get_runtime_context().gcs_address
        words = ("conduct", run, "--once", "--address", address)
        code, output = finish(jepa(*words), LIMIT_SECONDS)
        assert code == 0, output
        assert ray.get(ray.remote(lambda: 3).remote()) == 3
    assert {entry.step for entry in of_event(run, "done")} == {0, 4}
    (verdict,) = of_event(run, "verdict")
    assert verdict.details["keep"] == 4
