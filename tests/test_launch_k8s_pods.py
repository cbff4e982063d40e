"""The words of a rendered pod do what they promise: run for real, as process 1 where permitted."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.job import JobSpec
from launch.k8s import objects
from launch.k8s_pod import main, parse_options
from launch.local import start_node
from launch.ray import verdict
from launch.site import KubernetesSite, Site
from pipeline.environment import free_port
from pipeline.errors import ConfigError, UsageError
from pipeline.place import Node, node_of
from pipeline.track.metrics import read_events, read_metrics
from tests.k8s_objects import pod_templates
from tests.running import finish, jepa, long_stage, wait_until, write_config
from tests.shards import write_dataset

# More than are ever taken: every run here is stopped, and none can end before that.
NUM_STEPS = 1000
# Two starts with their checks; on a busy machine imports alone take a minute.
PATIENCE_SECONDS = 400
pytestmark = pytest.mark.timeout(1500)
PLACE = {
    "JOB_COMPLETION_INDEX": "1",
    "JEPA_NODES": "2",
    "JEPA_RANKS_PER_NODE": "8",
    "MASTER_ADDR": "a-node-0-0.a",
    "MASTER_PORT": "29500",
}
KUBEFLOW = {
    "PET_NODE_RANK": "1",
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "a-node-0-0.a",
    "PET_MASTER_PORT": "29500",
}


def new_processes_can_be_first() -> bool:
    """Whether this user may make a process tree of its own."""
    if shutil.which("unshare") is None:
        return False
    words = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0


AS_FIRST = (
    ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if new_processes_can_be_first()
    else []
)
needs_first = pytest.mark.skipif(not AS_FIRST, reason="unshare may not make a process tree here")


@pytest.mark.parametrize("env", [PLACE, KUBEFLOW, {**PLACE, **KUBEFLOW}])
def test_a_pod_knows_its_place(env):
    node = Node(
        rank=1, count=2, num_ranks=8, master_address="a-node-0-0.a", master_port=29500
    )  # fmt: skip
    assert node_of(env) == node


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({name: ""}, name) for name in PLACE),
        ({"JOB_COMPLETION_INDEX": "2"}, "does not exist"),
        ({"JEPA_NODES": "two"}, "JEPA_NODES"),
        ({"PET_NODE_RANK": "0"}, "contradicts"),
    ],
)
def test_a_pod_that_does_not_know_its_place_never_trains_alone(changes, says):
    with pytest.raises(ConfigError, match=says):
        node_of({**PLACE, **changes})


def test_the_second_pod_has_the_later_ranks_and_says_who_failed(tmp_path, capfd):
    program = tmp_path / "rank.py"
    program.write_text(
        "import os, sys\n"
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR']\n"
        "words = [os.environ[name] for name in names]\n"
        "open(f'{os.path.dirname(__file__)}/{words[0]}', 'w').write(' '.join(words))\n"
        "sys.exit(93 if words[0] == '3' else 76)\n"
    )
    node = Node(rank=1, count=2, num_ranks=2, master_address="first", master_port=1)
    assert start_node([str(program)], node=node) == 93
    assert (tmp_path / "2").read_text() == "2 0 4 2 first"
    assert (tmp_path / "3").read_text() == "3 1 4 2 first"
    assert "rank 3 ended with exit code 93" in capfd.readouterr().err


@pytest.mark.parametrize("words", [[], ["--wait"], ["--wait", "x", "train"], ["--what", "train"]])
def test_words_that_cannot_be_are_refused(words):
    with pytest.raises(UsageError):
        parse_options(words)


def test_a_first_pod_that_never_comes_is_named(monkeypatch, capfd):
    for name, value in {**PLACE, "MASTER_ADDR": "never.invalid"}.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (15, 2, 10, 12)}
    try:
        assert main(["--wait", "1", "train", "x.yaml"]) == 76
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "node 1 of 2 waited 1 s for the name of node 0, never.invalid" in capfd.readouterr().err


def first_process(started: subprocess.Popen) -> int:
    """The process number, seen from here, of what is process 1 of its own tree."""
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    wait_until(lambda: bool(children.read_text().split()), "a child of unshare")
    return int(children.read_text().split()[0])


@needs_first
def test_a_pod_that_waits_for_another_ends_at_once_when_told():
    """As process 1 it would not even hear of it without a handler."""
    env = {**os.environ, **PLACE, "MASTER_ADDR": "never.invalid"}
    # The real thing, but it says at once that it waits.
    code = "from launch import k8s_pod as p; p._SILENT_SECONDS = 0; raise SystemExit(p.main())"
    command = [*AS_FIRST, sys.executable, "-c", code, "--wait", "600", "train", "x"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as pod:
        assert pod.stderr is not None
        assert "waits for the name" in pod.stderr.readline()
        os.kill(first_process(pod), signal.SIGTERM)
        assert pod.wait(timeout=60) == 128 + signal.SIGTERM


@needs_first
def test_a_shell_as_process_1_would_keep_the_signal_back(tmp_path):
    """Why the command of every pod is in exec form."""
    program = tmp_path / "waits.py"
    program.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    command = [*AS_FIRST, "bash", "-c", f"{sys.executable} {program}; true"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        os.kill(first_process(shell), signal.SIGTERM)
        time.sleep(1)
        assert shell.poll() is None
        shell.kill()


def start_pods(config: Path, folder: Path, *, checked: bool = True) -> list[subprocess.Popen]:
    """The two pods of the JobSet that a run becomes, each as process 1 where permitted.

    Here there is no network of pods and no ConfigMap: both are named as they are here.
    """
    site = Site(
        python=sys.executable, image="i:1", memory_gib=66, nodes=2, gpus_per_node=0,
        environment={"OMP_NUM_THREADS": "1"}, k8s=KubernetesSite(check_seconds=300),
        preflight=checked,
    )  # fmt: skip
    job = JobSpec(
        name=config.stem, kind="train", argv=("train", str(config), "--or-resume"),
        work_dir=folder, run_dir=folder / config.stem, config_path=config,
        config_text=config.read_text(), nodes=2, memory_gib=66, image="i:1",
        environment=site.environment,
    )  # fmt: skip
    jobset = next(one for one in objects(job, site) if one["kind"] == "JobSet")
    (container,) = pod_templates(jobset)[0]["spec"]["containers"]
    here = {"/etc/jepa/run.yaml": str(config)}
    command = [*AS_FIRST, *(here.get(word, word) for word in container["command"])]
    env = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    ours = ("HOME", "TORCH_EXTENSIONS_DIR")
    env = {**os.environ, **{name: value for name, value in env.items() if name not in ours}}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**env, "JOB_COMPLETION_INDEX": str(index), "JEPA_NODE_NAME": f"node-{index}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pods")
    write_dataset(folder / "data", 24)
    return folder


def has_step(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and len(read_metrics(run)) >= step


def losses_of(run: Path) -> list[float]:
    return [step.report.loss for step in read_metrics(run)]


@pytest.fixture(scope="module")
def on_pods(folder) -> tuple[Path, int]:
    """A run told to end, started again and stopped for good; the step at which it was told."""
    config, run = write_config(folder, "pods", stages=long_stage(NUM_STEPS)), folder / "pods"
    pods = start_pods(config, folder)
    wait_until(lambda: has_step(run, 3), "step 3", PATIENCE_SECONDS)
    for pod in pods:
        os.kill(first_process(pod) if AS_FIRST else pod.pid, signal.SIGTERM)
    ended = [finish(pod, PATIENCE_SECONDS) for pod in pods]
    assert [code for code, _ in ended] == [75, 75], ended
    saved = len(read_metrics(run))
    pods = start_pods(config, folder, checked=False)
    wait_until(lambda: has_step(run, saved + 3), "further steps", PATIENCE_SECONDS)
    code, output = finish(jepa("stop", run), PATIENCE_SECONDS)
    assert code == 0, output
    ended = [finish(pod, PATIENCE_SECONDS) for pod in pods]
    assert [code for code, _ in ended] == [0, 0], "with 75 all would be started again"
    return run, saved


@pytest.fixture(scope="module")
def under_ray(folder) -> tuple[Path, int]:
    """A run that loses a rank, and how far it was when Ray had started it again."""
    config, run = write_config(folder, "ray", stages=long_stage(NUM_STEPS)), folder / "ray"
    started = jepa("launch", "ray", config, "--ranks", 2, "--cpus-only")
    wait_until(lambda: has_step(run, 3), "step 3", PATIENCE_SECONDS)
    rank_of(started, "1").kill()
    wait_until(lambda: "resume" in names_of(run), "a new start by Ray", PATIENCE_SECONDS)
    before = len(read_metrics(run))
    wait_until(lambda: has_step(run, before + 2), "further steps", PATIENCE_SECONDS)
    started.send_signal(signal.SIGTERM)
    code, output = finish(started, PATIENCE_SECONDS)
    assert code == 75, output[-4000:]
    return run, before


@pytest.fixture(scope="module")
def losses(folder, on_pods, under_ray) -> list[float]:
    """Of a run that nobody disturbs until it is as far as the others; saves are not its point."""
    steps = max(len(read_metrics(run)) for run, _ in (on_pods, under_ray))
    seldom = {"every_steps": NUM_STEPS}
    config = write_config(folder, "local", stages=long_stage(NUM_STEPS), checkpoint=seldom)
    local = jepa("train", config, "--ranks", 2)
    wait_until(lambda: has_step(folder / "local", steps), f"step {steps}", PATIENCE_SECONDS)
    local.send_signal(signal.SIGTERM)
    code, output = finish(local, PATIENCE_SECONDS)
    assert code == 75, output[-4000:]
    return losses_of(folder / "local")


def test_pods_save_when_told_and_go_on_as_if_nothing_had_been(on_pods, losses):
    run, saved = on_pods
    starts = [event for event in read_events(run) if event.name in ("start", "resume")]
    assert [event.step for event in starts] == [0, saved]
    found = losses_of(run)
    assert saved + 3 <= len(found) < NUM_STEPS
    assert found == losses[: len(found)]


def test_ray_train_starts_ranks_again_and_gives_the_same_losses(under_ray, losses):
    run, before = under_ray
    found = losses_of(run)
    assert before + 2 <= len(found) < NUM_STEPS
    assert found == losses[: len(found)]


def rank_of(started: subprocess.Popen, rank: str) -> psutil.Process:
    """A rank among all that a process has started."""
    for process in psutil.Process(started.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "--or-resume" in process.cmdline() and process.environ().get("RANK") == rank:
                return process
    raise AssertionError(f"rank {rank} is not there")


def names_of(run: Path) -> list[str]:
    return [event.name for event in read_events(run)]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([0, 75], 75), ([76, 78], 78), ([76, 75], 76), ([75, 65], 65), ([76, 76], 76)],
)
def test_ranks_under_ray_end_with_the_code_of_the_cause(codes, expected):
    assert verdict(codes) == expected
