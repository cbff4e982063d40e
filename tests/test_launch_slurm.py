"""What is handed to Slurm: whole files by comparison, and names that try to break out of them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.job import JobSpec, Mount, duration_text, parse_duration
from launch.request import Request, fitting_nodes, prepare
from launch.site import Site, SlurmSite, find_site
from launch.slurm import BODY, render
from pipeline.cli import main
from pipeline.config.load import load_config
from pipeline.errors import ConfigError, ExitCode, UsageError
from pipeline.run import RunConfig
from tests.slurm_cluster import LIMIT_SECONDS, running_cluster, skip_or_fail_without_slurm

ROOT = Path(__file__).parent.parent
FILES = ROOT / "slurm"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
RUN = Path("/shared/runs/vitl16")
TRAIN = JobSpec(
    name="vitl16",
    kind="train",
    argv=("train", f"{RUN}/jobs/config.yaml", "--or-resume"),
    work_dir=Path("/shared/jepa"),
    run_dir=RUN,
    config_path=RUN / "jobs/config.yaml",
    nodes=16,
    min_nodes=8,
    node_counts=(8, 12, 16),
    gpus_per_node=8,
    ranks_per_node=8,
    cpus_per_rank=12,
)
PREP = replace(
    TRAIN, name="prep", kind="prep", run_dir=Path("/shared/runs/prep"), config_path=None, nodes=1,
    min_nodes=None, node_counts=(), gpus_per_node=0, ranks_per_node=4, cpus_per_rank=4,
    argv=("prep", "run", "/data/videos/{}", "--out", "/shared/data/{}"), each=("ssv2", "k710"),
)  # fmt: skip
CONDUCT = replace(
    PREP, name="conduct", kind="conduct", run_dir=RUN, nodes=2, each=(),
    argv=("conduct", str(RUN), "--address", "auto"),
)  # fmt: skip


def examples() -> dict[str, str]:
    """Every file of the folder that is rendered, by its name."""

    def site(name: str, *overrides: str) -> Site:
        return find_site(FILES / f"site-{name}.yaml", overrides)

    def with_site(job: JobSpec, found: Site) -> JobSpec:
        mounts = tuple(mount.mount for mount in found.mounts)
        return replace(job, environment=found.environment, image=found.image, mounts=mounts)

    gpu, cpu, pyxis, apptainer = site("gpu"), site("cpu"), site("pyxis"), site("apptainer")
    torchrun = site("gpu", "slurm.launcher=torchrun")
    small = replace(TRAIN, gpus_per_node=4, ranks_per_node=4, cpus_per_rank=16)
    return {
        "train.sbatch": render(with_site(TRAIN, gpu), gpu),
        "train-torchrun.sbatch": render(with_site(TRAIN, torchrun), torchrun),
        "train-pyxis.sbatch": render(with_site(TRAIN, pyxis), pyxis),
        "train-apptainer.sbatch": render(with_site(small, apptainer), apptainer),
        "prep-array.sbatch": render(with_site(PREP, cpu), cpu),
        "conduct-ray.sbatch": render(with_site(CONDUCT, cpu), cpu, after=["after:17"]),
    }


@pytest.mark.parametrize("name", sorted(examples()))
def test_the_shipped_file_is_what_is_rendered(name, pytestconfig):
    text = examples()[name]
    assert (FILES / name).read_text() == text, (
        f"slurm/{name} is not what is rendered now; if that is meant: "
        "python -m tests.test_launch_slurm"
    )


@pytest.mark.slurm
@pytest.mark.timeout(LIMIT_SECONDS)
def test_slurm_takes_every_shipped_file_and_refuses_what_cannot_be():
    skip_or_fail_without_slurm()
    names = ("gpu", "cpu", "boost")
    big = {"NODES": "16", "CPUS": "96", "GPUS": "8", "GPU_TYPE": "a100", "MEMORY": "1600000"}
    partitions = "\n".join(f"PartitionName={name} Nodes=node[1-16]" for name in names)
    with running_cluster(**big, EXTRA=partitions) as cluster:
        # What conduct-ray.sbatch waits for.
        for _ in range(17):
            cluster.run("sbatch", "--hold", "--output=/dev/null", "--wrap", "true")
        for name in sorted(examples()):
            cluster.run("sbatch", "--test-only", FILES / name)
        for wrong in ("--partition=none", "--nodes=17", "--gpus-per-node=h100:8", "--time=soon"):
            with pytest.raises(AssertionError, match=r"sbatch: error|allocation failure"):
                cluster.run("sbatch", "--test-only", wrong, FILES / "train.sbatch")


def test_no_other_batch_file_is_shipped():
    assert {path.name for path in FILES.glob("*.sbatch")} == set(examples())


@pytest.mark.parametrize("name", sorted(examples()))
def test_shellcheck_finds_nothing(name):
    checked = subprocess.run(
        [SHELLCHECK, "-"], input=examples()[name], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


HOSTILE = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
TRICKS = st.sampled_from(
    ["$(touch OUT)", "`touch OUT`", "'; touch OUT #", '"; touch OUT; "', "a\n#SBATCH --wrap=x\n",
     "${HOME}", "\\", "'", "é ∂ \U0001f3a5", "-n", "*", "~", "{}", "\r\n", "!x", "&&", "\x1b[2J"]
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(HOSTILE | TRICKS, max_size=4), value=HOSTILE | TRICKS, path=HOSTILE | TRICKS)
def test_no_text_of_a_job_is_more_than_text_in_its_script(words, value, path, tmp_path):
    job = replace(
        TRAIN, argv=("train", *words), environment={"SOME": value},
        mounts=(Mount(source=path, target="/x"),), image=value,
    )  # fmt: skip
    site = Site(python="py", scratch="/tmp", slurm=SlurmSite(container="apptainer"))  # noqa: S108
    text = render(job, site).replace(BODY.read_text(), "")
    assert sum(line.startswith("#SBATCH") for line in text.splitlines()) == 12
    ask = '\nprintf "%s\\0" "${command[@]}" "${inside[@]}" "$SOME"\n'
    done = subprocess.run(
        ["bash", "-u"], input=(text + ask).encode(), capture_output=True, check=True, cwd=tmp_path
    )
    told = done.stdout.decode().split("\0")[:-1]
    container = ["apptainer", "exec", "--nv", "--bind", f"{path}:/x", "--pwd", str(job.work_dir)]
    assert told == ["py", "-m", "pipeline.cli", "train", *words, *container, value, value]
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(text=HOSTILE | TRICKS)
def test_what_a_directive_cannot_hold_is_refused(text):
    for change in ({"run_dir": Path(f"/runs/{text}")}, {"work_dir": Path(f"/runs/{text}")}):
        try:
            rendered = render(replace(TRAIN, **change), Site())
        except UsageError:
            continue
        head = rendered.split("# ---- This job")[0].splitlines()
        assert all(line.startswith(("#", "")) and len(line.split()) <= 16 for line in head)
        assert sum(line.startswith("#SBATCH") for line in head) == 12


@pytest.mark.parametrize("name", ["a b", "a\n#SBATCH --wrap=x", "$(x)", "", "-a", "a/b", "é"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(UsageError, match="name"):
        replace(TRAIN, name=name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "gpu --wrap=x"),
        ("account", "a\n#SBATCH -x"),
        ("qos", "`x`"),
        ("extra", "['a b']"),
    ],
)
def test_a_site_cannot_smuggle_a_directive_in(tmp_path, key, value):
    shown = value if key == "extra" else repr(value)
    with pytest.raises(ConfigError, match=f"slurm.{key}"):
        find_site(FILES / "site-gpu.yaml", (f"slurm.{key}={shown}",))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("30:00", 1800),
        ("24:00:00", 86_400),
        ("2-12", 216_000),
        ("1-00:00:01", 86_401),
    ],
)
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert parse_duration(text) == seconds
    assert parse_duration(duration_text(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "0", "1:2:3:4", "a", "-1", "1.5", "00:00:00", "10 min"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match="time"):
        parse_duration(text)


def test_nodes_that_cannot_share_the_batch_are_refused_with_those_that_can(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "pipeline/configs/tiny-cpu.yaml"
    request = Request(
        site=FILES / "site-cpu.yaml", nodes=3, ranks_per_node=2, set=("slurm.partition=x",)
    )
    with pytest.raises(ConfigError, match="3 nodes of 2 ranks") as caught:
        prepare([str(config), "global_batch=16"], request)
    assert "can: 1, 2;" in caught.value.remedy
    run = load_config(config, RunConfig, ["global_batch=16"]).config
    assert fitting_nodes(run, 2, 3) == (1, 2)


def test_the_configuration_is_frozen_when_the_job_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / "pipeline/configs/tiny-cpu.yaml"), "seed=7"]
    job = prepare(words, Request(site=FILES / "site-cpu.yaml", ranks_per_node=2)).job
    assert job.argv[1] == str(job.config_path)
    assert "seed: 7\n" in (job.config_text or "")
    assert job.run_dir == tmp_path / "runs/tiny-cpu"
    assert job.grace_seconds == 180
    job.run_dir.mkdir(parents=True)
    told = '{"time": 1.0, "event": "save", "step": 2, "behind_seconds": 200.5}\n'
    (job.run_dir / "events.jsonl").write_text(told)
    again = prepare(words, Request(site=FILES / "site-cpu.yaml", ranks_per_node=2)).job
    assert again.grace_seconds == 201 + 60, "as long as the longest save, and a step"
    assert job.environment == {"OMP_NUM_THREADS": "1"}


def test_print_gives_the_file_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["launch", "slurm", ROOT / "pipeline/configs/tiny-cpu.yaml", "--print"]
    flags = ["--site", FILES / "site-cpu.yaml", "--ranks-per-node", "2", "--after", "afterany:7"]
    assert main([str(word) for word in [*words, *flags]]) == ExitCode.DONE
    text, told = capsys.readouterr()
    assert f"mkdir -p {tmp_path}/runs/tiny-cpu/jobs && jepa config show" in told
    assert text.startswith("#!/bin/bash\n")
    assert "#SBATCH --dependency=afterany:7\n" in text
    assert text.endswith(BODY.read_text())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--after", "yesterday"], "number of a job"),
        (["--site", "none.yaml"], "no file at none.yaml"),
        (["--nodes", "0"], "at least 1"),
        (["--time", "soon"], "a time such as"),
        (["--time", "1:00"], "does not fit"),
        (["--min-nodes", "9"], "at most 1 min_nodes"),
        (["--each", "a"], "--each makes an array"),
        (["--set", "slurm.partitoin=x"], "partition"),
    ],
)
def test_a_wrong_flag_is_told_with_what_was_expected(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    site = [] if "--site" in flags else ["--site", str(FILES / "site-cpu.yaml")]
    config = str(ROOT / "pipeline/configs/tiny-cpu.yaml")
    code = main(["launch", "slurm", config, "--print", "--ranks-per-node", "2", *site, *flags])
    assert code in (ExitCode.USAGE, ExitCode.CONFIG)
    assert words in capsys.readouterr().err


def test_without_a_site_file_the_examples_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "pipeline/configs/tiny-cpu.yaml")
    assert main(["launch", "slurm", config, "--print"]) == ExitCode.USAGE
    assert "slurm/site-*.yaml" in capsys.readouterr().err


if __name__ == "__main__":
    for name, text in examples().items():
        (FILES / name).write_text(text)
