"""A run that is killed in every phase, one after the other, is the run that was never disturbed."""

import signal
import subprocess
import sys

import pytest

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import iterate_weights
from pipeline.errors import ExitCode
from tests.faults.harness import PHASES, ROOT, Fault, Run
from tests.shards import write_dataset

SAVE_EVERY = 2
STEPS = 2 * len(PHASES) + 4
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    write_dataset(folder / "data", 24)
    return folder


@pytest.fixture(scope="module")
def calm(folder) -> Run:
    run = Run(folder, "calm", steps=STEPS)
    outcome = run.attempt()
    assert outcome.code == ExitCode.DONE, outcome.output
    return run


@pytest.fixture(scope="module")
def hurt(folder) -> tuple[Run, list]:
    """Killed once in every phase, with a worker killed before; what every start left behind."""
    run, story = Run(folder, "hurt", steps=STEPS), []
    for number, phase in enumerate(PHASES):
        step = 2 * number + 3
        worker = Fault(phase="log", step=step - 2, deed="kill_worker")
        outcome = run.attempt(*([worker] if number % 4 == 0 else []), Fault(phase=phase, step=step))
        story.append((phase, outcome, run.steps()[-1], run.commits()))
    story.append(("end", run.attempt(), run.steps()[-1], run.commits()))
    return run, story


def test_every_kill_happens_where_it_was_planned(hurt):
    _, story = hurt
    codes = [(phase, outcome.code) for phase, outcome, _, _ in story]
    expected = [*((phase, -signal.SIGKILL) for phase in PHASES), ("end", ExitCode.DONE)]
    assert codes == expected, "\n".join(outcome.output[-1500:] for _, outcome, _, _ in story)


def test_losses_are_bit_for_bit_those_of_the_undisturbed_run(calm, hurt):
    assert hurt[0].losses() == calm.losses()
    assert hurt[0].steps() == list(range(1, STEPS + 1))


def test_weights_at_the_end_are_bit_for_bit_those_of_the_undisturbed_run(calm, hurt):
    ends = [layout.list_commits(run.path)[-1] for run in (calm, hurt[0])]
    assert [end.step for end in ends] == [STEPS, STEPS]
    expected, found = (dict(iterate_weights(end.path)) for end in ends)
    assert expected.keys() == found.keys()
    assert all(found[name].equal(weight) for name, weight in expected.items())


def test_no_kill_costs_more_steps_than_lie_between_two_saves_and_one_in_flight(hurt):
    run, story = hurt
    resumed = [event["step"] for event in steps_of(run, "resume")]
    lost = [last - step for (_, _, last, _), step in zip(story, resumed, strict=False)]
    assert max(lost) <= 2 * SAVE_EVERY
    assert min(lost) >= 0


def test_a_save_that_was_cut_short_is_named_and_never_taken(hurt):
    run, story = hurt
    ignored = [name for event in run.events("resume") for name in event["ignored_saves"]]
    assert any("step-" in name for name in ignored)
    left = [path.name for path in (run.path / "checkpoints").iterdir()]
    assert not [name for name in left if "partial" in name]
    for _, _, _, commits in story:
        assert commits, "there was a whole commit at every moment"


def test_a_worker_killed_in_the_middle_is_on_record(hurt):
    notices = [event["notice"] for event in hurt[0].events("loader")]
    assert notices
    assert all("killed by SIGKILL" in notice and "restarted" in notice for notice in notices)


def test_no_start_compiles_anything_that_a_kill_could_leave_locked(hurt):
    """torch waits without a limit for a build that was killed; the only cure is not to build."""
    assert not (hurt[0].path.parent / "extensions").exists()


def steps_of(run: Run, name: str) -> list[dict]:
    from pipeline.track.metrics import read_events  # noqa: PLC0415

    return [{"step": event.step} for event in read_events(run.path) if event.name == name]


def test_a_full_disk_drops_the_save_and_ends_the_run_with_its_last_commit_whole(folder):
    run = Run(folder, "full", steps=40, checkpoint={"every_steps": 2, "retries": 0})
    outcome = run.attempt(Fault(phase="log", step=5, deed="fill:20000"))
    assert outcome.code == ExitCode.STORAGE, outcome.output
    assert "File too large" in outcome.output
    failed = [step["step"] for step in steps_of(run, "save_failed")]
    assert failed
    assert run.steps()[-1] > failed[0], "the run went on after the first save that failed"
    assert run.commits()[-1] < failed[0]
    assert not list((run.path / "checkpoints").glob("*partial*"))
    verified = [sys.executable, "-m", "pipeline.cli", "ckpt", "verify", str(run.path)]
    assert subprocess.run(verified, cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_too_little_shared_memory_is_told_before_the_run_begins(folder):
    run = Run(folder, "tiny-shm", steps=4)
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = [sys.executable, "-m", "pipeline.cli", "train", str(run.yaml)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == ExitCode.STORAGE, done.stderr
    assert "shared memory /dev/shm: need" in done.stderr
    assert "--shm-size" in done.stderr
