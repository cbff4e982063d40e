"""What the conductor decides: jobs from checkpoints and journal, wishes, and who removes."""

import json
import threading

import pytest

from pipeline.checkpoint.layout import CheckpointConfig
from pipeline.checkpoint.retain import pin, prune
from pipeline.checkpoint.wishes import WISHES_FILE, Wishes, read_wishes, write_wishes
from pipeline.cli import main
from pipeline.conduct.driver import check_resources
from pipeline.conduct.follow import Follow
from pipeline.conduct.jobs import (
    Job,
    Settled,
    Wanted,
    can_begin,
    in_order,
    one_at_a_time,
    open_jobs,
    seen_commits,
    settled_from,
)
from pipeline.conduct.prepare import find_config, prepare_probes
from pipeline.conduct.retention import remove_unwanted, wishes_of
from pipeline.conduct.settings import ConductConfig, RetentionConfig
from pipeline.config.load import SHIPPED_CONFIGS
from pipeline.errors import ConfigError
from pipeline.track.folder import update_run_info
from pipeline.track.journal import JournalEntry
from pipeline.track.lease import OwnerError, acquire
from tests.probe_data import write_run

LAST_TWO = CheckpointConfig(keep_last=2)
EVERYTHING = ConductConfig.model_validate_json(
    json.dumps(
        {
            "mirror": {"url": "file:///elsewhere", "keep": "as_here"},
            "export": {"formats": ["safetensors", "hf"], "every_steps": 20},
            "probes": [{"task": "synthetic"}],
        }
    )
)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, (0, 10, 20, 30))


def wanted(config=EVERYTHING, *, is_tracked=True):
    return Wanted(
        config=config,
        probe_versions={"synthetic": "v1"},
        probe_every={"synthetic": None},
        is_tracked=is_tracked,
    )


def note(settled, event, job, **details):
    details = {"mark": job.mark, **details}
    entry = JournalEntry(time=0.0, event=event, step=job.step, key=job.key, details=details)
    settled.take(entry)


def work_off(run, asked, settled):
    """Does every job at once, and tells in which order."""
    done = []
    while jobs := [j for j in open_now(run, asked, settled) if can_begin(j, settled)]:
        job = in_order(jobs)[0]
        note(settled, "done", job)
        done.append(job)
    return done


def open_now(run, asked, settled, *, is_finished=False):
    return open_jobs(seen_commits(run), asked, settled, is_finished=is_finished)


def test_every_job_is_done_once_after_verifying_and_those_due_alone(run):
    settled = Settled()
    done = work_off(run, wanted(), settled)
    assert len({job.key for job in done}) == len(done)
    by_kind = {kind: [j.step for j in done if j.kind == kind] for kind in ("verify", "mirror")}
    assert by_kind == {"verify": [0, 10, 20, 30], "mirror": [0, 10, 20, 30]}
    assert sorted((j.step, j.name) for j in done if j.kind == "export") == [
        (0, "hf"),
        (0, "safetensors"),
        (20, "hf"),
        (20, "safetensors"),
    ]
    assert [j.step for j in done if j.kind == "record"] == [0, 10, 20, 30]
    for job in done:
        first = next(i for i, j in enumerate(done) if j.step == job.step)
        assert done[first].kind == "verify"
    scored = Settled(done=settled.done - {j.key for j in done if j.kind == "record"})
    scored.steps = settled.steps
    assert [j.step for j in open_jobs([], wanted(), scored, is_finished=True)] == [0, 10, 20, 30]
    last = open_now(run, wanted(), settled, is_finished=True)
    assert {(job.kind, job.step) for job in last} == {("export", 30)}


def test_a_step_that_was_trained_again_and_a_task_that_was_changed_count_anew(run, tmp_path):
    settled = Settled()
    work_off(run, wanted(), settled)
    manifest = run / "checkpoints" / "step-00000010" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert {job.step for job in open_now(run, wanted(), settled)} == {10}
    changed = Wanted(
        config=EVERYTHING,
        probe_versions={"synthetic": "v2"},
        probe_every={"synthetic": 20},
        is_tracked=False,
    )
    found = [(j.kind, j.step) for j in open_now(run, changed, settled) if j.step != 10]
    assert found == [("probe", 0), ("probe", 20)]


def test_nothing_is_done_with_what_is_damaged_or_given_up_until_it_is_tried_again(run):
    settled = Settled()
    jobs = {job.step: job for job in open_now(run, wanted(), settled) if job.kind == "verify"}
    note(settled, "damaged", jobs[10], reason="file x is missing")
    note(settled, "failed", jobs[20], reason="disk")
    note(settled, "given_up", jobs[20], reason="disk")
    assert {job.step for job in open_now(run, wanted(), settled)} == {0, 30}
    settled.take(JournalEntry(time=0.0, event="retry", step=None, key="", details={}))
    assert {job.step for job in open_now(run, wanted(), settled)} == {0, 10, 20, 30}
    assert settled.failures[jobs[20].key] == 0


def test_the_mirror_loses_only_what_is_gone_here_and_newer_in_both_places(run):
    settled = Settled()
    marks = {seen.step: seen.mark for seen in seen_commits(run)}
    work_off(run, wanted(), settled)
    for step in (10, 30):
        job = Job(kind="verify", step=step, mark=marks[step])
        (run / "checkpoints" / f"step-{step:08d}").rename(run / f"gone-{step}")
        note(settled, "gone", job)
    found = open_now(run, wanted(), settled)
    assert [(job.kind, job.step) for job in found] == [("unmirror", 10)]


def test_what_writes_one_place_is_done_one_after_the_other(run):
    settled = Settled()
    for job in open_now(run, wanted(), settled):
        if job.kind == "verify":
            note(settled, "done", job)
    ready = in_order(open_now(run, wanted(), settled))
    first = one_at_a_time(ready, [])
    assert [job.step for job in first if job.kind == "mirror"] == [0]
    assert [job for job in ready if job.kind != "mirror"] == [
        j for j in first if j.kind != "mirror"
    ]
    unmirror = Job(kind="unmirror", step=10, mark="gone", version="v")
    for busy in (first[0], unmirror):
        assert all(job.kind != "mirror" for job in one_at_a_time(ready, [busy.key]))
    (probe,) = [job for job in first if job.kind == "probe"][:1]
    assert one_at_a_time(ready, [probe.key]) == first


def test_a_journal_that_is_read_again_says_the_same(run):
    entries = []
    settled = Settled()
    for job in open_now(run, wanted(), settled)[:5]:
        details = {"mark": job.mark}
        entries.append(
            JournalEntry(time=0.0, event="done", step=job.step, key=job.key, details=details)
        )
        settled.take(entries[-1])
    again = settled_from(entries)
    assert (again.done, again.steps) == (settled.done, settled.steps)


def test_wishes_keep_the_best_hold_the_newest_that_wait_and_free_what_is_done():
    steps = (0, 10, 20, 30, 40, 50)
    config = RetentionConfig(keep_best=1, keep_last=2, keep_every_steps=20, hold_at_most=2)
    waiting = {30: "step 30: probe", 40: "step 40: probe", 10: "step 10: verify"}
    wishes = wishes_of(steps, waiting, [(20, "number 1"), (10, "number 2")], config)
    assert set(wishes.keep) == {20, 40, 50}
    assert set(wishes.work) == {30, 40}
    assert wishes.free == set()
    assert wishes_of(steps, {}, [], config).free == {10, 30}
    none = wishes_of(steps, waiting, [(20, "")], RetentionConfig(enabled=False))
    assert (none.keep, none.free) == ({}, frozenset())


def test_pruning_obeys_wishes_pins_and_settings_and_never_takes_first_or_newest(run):
    write_wishes(run, Wishes(keep={10: "best"}, work={}, free=frozenset({0, 20, 30})))
    every = CheckpointConfig(keep_last=1, keep_every_steps=10)
    assert prune(run, every) == [20]
    write_wishes(run, Wishes(free=frozenset({10})))
    pin(next(commit for commit in seen_commits(run) if commit.step == 10))
    assert prune(run, every) == []
    (run / WISHES_FILE).write_text("{")
    with pytest.raises(OSError, match="expected a list of wishes"):
        prune(run, LAST_TWO)


def test_work_that_nobody_confirms_any_more_holds_nothing(run):
    write_wishes(run, Wishes(keep={10: "best"}, work={20: "waits"}))
    assert read_wishes(run).why(20) == "waits"
    raw = json.loads((run / WISHES_FILE).read_text())
    (run / WISHES_FILE).write_text(json.dumps({**raw, "confirmed": raw["confirmed"] - 4000}))
    assert read_wishes(run).why(20) is None
    assert read_wishes(run).why(10) == "best"


def test_only_the_owner_removes_and_never_while_the_newest_is_not_verified(run):
    lease = acquire(run)
    assert remove_unwanted(run, CheckpointConfig(keep_last=1), whole={30}) == []
    lease.release()
    assert remove_unwanted(run, CheckpointConfig(keep_last=1), whole={20}) == []
    removed = remove_unwanted(run, CheckpointConfig(keep_last=1), whole={30})
    assert [step for step, _ in removed] == [10, 20]
    assert all("not the first nor among the newest 1" in why for _, why in removed)
    # The moment's lease is given back: whoever resumes takes it at once.
    acquire(run).release()


def test_a_resume_waits_for_the_moment_of_a_removal_instead_of_being_refused(run):
    brief = acquire(run, brief=True)
    threading.Timer(1.0, brief.release).start()
    mine = acquire(run)
    assert mine.token == brief.token + 1
    mine.release()


def test_what_a_killed_conductor_found_out_and_did_not_tell_is_told_by_the_next(run):
    update_run_info(run, {"run_id": "r"})
    verdict = {"state": "watch", "keep": 30, "text": "so"}
    first = Follow(run, ConductConfig(), {})
    assert first.has_news  # nobody has judged it yet
    first.begin_judging()
    first.conclude(first.look()[0], {"problems": []}, None)  # too late for what is being written
    first.note_verdict(verdict)
    first.close()
    second = Follow(run, ConductConfig(), {})
    assert second.has_news
    second.begin_judging()
    second.note_verdict(verdict)
    second.close()
    third = Follow(run, ConductConfig(), {})
    assert not third.has_news
    third.close()


def test_a_run_has_one_conductor_and_the_next_may_come_when_it_has_gone(run):
    update_run_info(run, {"run_id": "r"})
    first = Follow(run, ConductConfig(), {})
    with pytest.raises(OwnerError, match="its conductor is in use by another job") as raised:
        Follow(run, ConductConfig(), {})
    assert "One conductor follows a run" in raised.value.remedy
    first.close()
    second = Follow(run, ConductConfig(), {})
    assert [job.kind for job in second.look()] == ["verify"] * 4
    second.close()
    assert not (run / "lease").exists()


def test_the_shipped_example_is_strict_and_its_tasks_are_there(tmp_path):
    config = find_config(SHIPPED_CONFIGS / "conduct" / "default.yaml", [])
    assert list(prepare_probes(config)) == ["ssv2"]
    check_resources(config)
    path = tmp_path / "conduct.yaml"
    path.write_text("mirror: {url: s3://u:secret@host/x}\nprobs: []\nnice: 40\n")
    with pytest.raises(ConfigError) as raised:
        find_config(path, [])
    told = str(raised.value)
    for part in ("mirror.url", "probs", "probes", "nice"):
        assert part in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("probes: [{task: nowhere}]", "expected a task file, found none at nowhere"),
        ("probes: [{task: ssv2}, {task: ssv2}]", "twice"),
        ("probes: [{task: synthetic, num_gpus: 1}]", "it could never run"),
        ("retention: {keep_best: -1}", "keep_best"),
    ],
)
def test_mistakes_in_the_configuration_end_it_before_anything_begins(
    run, tmp_path, capsys, text, said
):
    path = tmp_path / "conduct.yaml"
    path.write_text(text + "\n")
    assert main(["conduct", str(run), "--once", "--config", str(path)]) in (2, 78)
    assert said in capsys.readouterr().err
    assert main(["conduct"]) == 2
    assert not (run / "conduct.jsonl").exists()
