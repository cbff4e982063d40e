"""What a user wrote stays a value in the objects of Kubernetes, and what cannot be is refused."""

import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.job import JobSpec
from launch.k8s import objects, render
from launch.k8s_submit import record_of, submit, try_out
from launch.k8s_text import object_name, to_yaml
from launch.request import with_measured_grace
from launch.site import KubernetesSite, Site
from pipeline.cli import main
from pipeline.errors import ExitCode, UsageError
from pipeline.track.jobs import ask, read_jobs
from tests.k8s_objects import NO_KUBECTL, kubectl_is_new, kustomize, pod_templates, read_objects

ROOT = Path(__file__).parent.parent


def a_job(**changes) -> JobSpec:
    settings = {
        "name": "a",
        "kind": "train",
        "argv": ("train", "/frozen.yaml", "--or-resume"),
        "work_dir": Path("/data"),
        "run_dir": Path("/data/runs/a"),
        "config_path": Path("/frozen.yaml"),
        "config_text": "name: a\n",
        "nodes": 2,
        "ranks_per_node": 2,
        "memory_gib": 80,
        "image": "registry.example/jepa:1",
    }
    return JobSpec(**{**settings, **changes})


def expanded(text: str) -> str:
    """What the kubelet makes of a word: `$(NAME)` is looked up, `$$` is a `$`."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else "LEAKED", text)


# Everything but surrogates, which are not text, and NUL, which no process can be told.
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
hostile = st.one_of(
    anything,
    st.sampled_from(["$(HOME)", "$$(HOME)", "'\"\n- x: y", "yes", "1_000", "0o17", "1:30", "~"]),
    st.sampled_from(["é\u2028\x85\ufeff", "`id`;$(id)", "--- \n...", "a: b #c", " x ", "\t", ""]),
)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(hostile, max_size=4), value=hostile, text=hostile, folder=hostile)
def test_hostile_words_stay_words(words, value, text, folder):
    job = a_job(
        argv=("train", "/frozen.yaml", *words),
        environment={"X": value},
        config_text=text,
        run_dir=Path("/data") / f"x{folder}".replace("/", "_"),
    )
    site = Site(preflight=False, k8s=KubernetesSite(namespace="n"))
    found = {one["kind"]: one for one in read_objects(render(job, site))}
    assert set(found) == {"ConfigMap", "JobSet", "NetworkPolicy"}
    assert found["ConfigMap"]["data"] == {"run.yaml": text}
    (pod,) = pod_templates(found["JobSet"])
    (container,) = pod["spec"]["containers"]
    command = [expanded(word) for word in container["command"]]
    assert command[command.index("train") :] == ["train", "/etc/jepa/run.yaml", *words]
    assert command[command.index("--run") + 1] == f"x{folder}".replace("/", "_")
    values = {one["name"]: expanded(one["value"]) for one in container["env"] if "value" in one}
    assert values["X"] == value


@pytest.mark.skipif(not kubectl_is_new(), reason=NO_KUBECTL)
def test_hostile_words_come_through_kubectl(tmp_path):
    """Its reader is another one, in Go."""
    words = ["yes", "1_000", "0o17", "1:30", "$(id)", "'\"\n- x: y", "é\u2028", "~", "off"]
    job = a_job(argv=("train", "/frozen.yaml", *words), config_text="a: 1\n\n  b: '\ttab'\n# c\n")
    site = Site(preflight=False, k8s=KubernetesSite(namespace="n"))
    (tmp_path / "job.yaml").write_text(render(job, site))
    (tmp_path / "kustomization.yaml").write_text("resources: [job.yaml]\n")
    found = {one["kind"]: one for one in kustomize(tmp_path)}
    (pod,) = pod_templates(found["JobSet"])
    command = [expanded(word) for word in pod["spec"]["containers"][0]["command"]]
    assert command[-len(words) :] == words
    assert found["ConfigMap"]["data"]["run.yaml"] == job.config_text


@given(st.lists(st.text(string.ascii_letters + string.digits + "._-", min_size=1), min_size=2))
def test_names_are_labels_and_differ_where_the_jobs_do(names):
    made = {name: object_name(name) for name in names}
    for name in made.values():
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
        assert len(name) <= 40
    assert len(set(made.values())) == len(set(names))


def test_ray_words_pass_no_shell():
    job = a_job(kind="probe", argv=("probe", "$(id); rm", "it's"), config_text=None, nodes=1)
    found = {one["kind"]: one for one in objects(job, Site(gpus_per_node=0))}
    assert found["RayJob"]["spec"]["entrypoint"] == (
        "python -m launch.k8s_entry /etc/jepa/words.json"
    )
    assert "; rm" not in str(found["RayJob"])
    assert '"$(id); rm"' in found["ConfigMap"]["data"]["words.json"]


def test_an_array_is_one_job_for_each_value():
    job = a_job(kind="probe", argv=("probe", "--steps", "{}"), each=("1", "2"), nodes=1)
    found = objects(job, Site(gpus_per_node=0))
    kinds = [one["kind"] for one in found]
    assert kinds == ["ConfigMap", "RayJob"] * 2 + ["NetworkPolicy"] * 2
    assert '"2"' in found[2]["data"]["words.json"]
    names = [one["metadata"]["name"] for one in found if one["kind"] != "ConfigMap"]
    assert names == ["a-0", "a-1"] * 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": None}, "image"),
        ({"memory_gib": None}, "memory_gib"),
        ({"memory_gib": 65}, "shared memory counts"),
        ({"environment": {"MASTER_PORT": "1"}}, "MASTER_PORT"),
        ({"config_text": "x" * 1_000_000}, "too large"),
    ],
)
def test_what_pods_cannot_have_is_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        objects(a_job(**changes), Site())


def test_text_that_is_none_is_refused():
    with pytest.raises(UsageError, match="not UTF-8"):
        to_yaml([{"a": "\udcff"}])


def test_the_grace_period_follows_measured_saves(tmp_path):
    job = a_job(run_dir=tmp_path, grace_seconds=100)
    assert with_measured_grace(job).grace_seconds == 100
    line = '{"time": 1.0, "event": "save", "step": 2, "behind_seconds": %s}\n'
    (tmp_path / "events.jsonl").write_text(line % 30.2 + line % 200.4)
    assert with_measured_grace(job).grace_seconds == 201 + 60


def test_what_is_told_of_a_submission_names_the_object():
    made = objects(a_job(), Site())
    record = record_of(a_job(), made, Path("/x.yaml"))
    assert record.id == "jobset/a"
    assert record.stop == "kubectl --namespace jepa delete jobset/a"
    assert "logs --selector app.kubernetes.io/instance=a" in record.log


def fake_kubectl(folder: Path, monkeypatch, answers: str) -> Path:
    """A kubectl that notes its words, since there is no cluster; `answers` is a case of bash."""
    calls = folder / "calls"
    program = folder / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$*" >> {calls}\ncase "$1" in {answers} esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return calls


def test_a_submission_is_applied_written_down_and_never_applied_twice(tmp_path, monkeypatch):
    job = a_job(run_dir=tmp_path / "run")
    made = objects(job, Site())
    calls = fake_kubectl(tmp_path, monkeypatch, "get) ;; apply) echo created ;;")
    submitted = submit(job, made, to_yaml(made))
    path = tmp_path / "run" / "jobs" / "a-train.k8s.yaml"
    assert calls.read_text().splitlines() == [
        "get jobset/a --namespace jepa --ignore-not-found --output name",
        f"apply --filename {path}",
    ]
    assert read_objects(path.read_text()) == made
    assert [record.id for record in read_jobs(tmp_path / "run")] == ["jobset/a"]
    for word in ("watch", "stop", "pause", '{"spec":{"suspend":true}}'):
        assert word in submitted.words
    (tmp_path / "bin" / "kubectl").write_text("#!/bin/bash\necho jobset.jobset.x-k8s.io/a\n")
    with pytest.raises(UsageError, match="already there"):
        submit(job, made, to_yaml(made))


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("E1123 02:32:57.0 x.go:1] noise\nno matches for kind", "refused the job: no matches"),
        ("The connection to the server localhost:8080 was refused", "cannot be reached"),
    ],
)
def test_what_the_cluster_says_is_told(tmp_path, monkeypatch, says, told):
    fake_kubectl(tmp_path, monkeypatch, f"*) printf '{says}' >&2; exit 1 ;;")
    with pytest.raises(UsageError, match=told):
        try_out("kind: x\n")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--min-nodes", "1"], "is for Slurm"),
        (["--time", "12:00:00"], "--time ends no jobset of a training run"),
        (["--time", "12:00:00", "--set", "k8s.kind=rayjob"], None),
    ],
)
def test_a_flag_that_no_object_would_hold_is_refused(flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "pipeline/configs/tiny-cpu.yaml")
    site = ["--site", str(ROOT / "k8s/site-cpu.yaml"), "--set", "k8s.kind=jobset"]
    code = main(["launch", "k8s", config, "--print", "--nodes", "1", *site, *flags])
    out, err = capsys.readouterr()
    if told is None:
        assert (code, "activeDeadlineSeconds: 43200" in out) == (ExitCode.DONE, True), err
    else:
        assert (code, told in err) == (ExitCode.USAGE, True), err


SUSPENDED = {"spec": {"suspend": True}}


@pytest.mark.parametrize(
    ("one", "state", "detail"),
    [
        ({"kind": "JobSet", **SUSPENDED}, "queued", "waits for its queue"),
        ({"kind": "JobSet", "status": {"restarts": 2}}, "running", "2 restarts"),
        ({"kind": "Job"}, "running", ""),
        ({"kind": "RayJob", "status": {"jobDeploymentStatus": "Initializing"}}, "starting", ""),
        ({"kind": "RayJob"}, "queued", ""),
        *(
            (
                {"kind": kind, **SUSPENDED, "status": {"conditions": [
                    {"type": word, "status": "True", "message": "exit code 78"},
                ]}},
                state,
                "exit code 78" if state == "failed" else "",
            )
            for kind, word, state in [
                ("JobSet", "Completed", "finished"),
                ("JobSet", "Failed", "failed"),
                ("TrainJob", "Complete", "finished"),
            ]
        ),
    ],
)  # fmt: skip
def test_status_says_what_the_cluster_says(tmp_path, monkeypatch, one, state, detail):
    (tmp_path / "one.json").write_text(json.dumps(one, indent=1))
    calls = fake_kubectl(tmp_path, monkeypatch, f"*) cat {tmp_path}/one.json ;;")
    told = ask(record_of(a_job(), objects(a_job(), Site()), Path("/x.yaml")))
    assert told.state == state
    assert detail in told.detail
    assert calls.read_text() == "--namespace jepa get jobset/a --output json\n"


def test_status_of_a_job_that_the_cluster_forgot_is_unknown(tmp_path, monkeypatch):
    fake_kubectl(tmp_path, monkeypatch, "*) exit 1 ;;")
    told = ask(record_of(a_job(), objects(a_job(), Site()), Path("/x.yaml")))
    assert told.state == "unknown"
