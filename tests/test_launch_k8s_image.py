"""The image's recipe keeps its rules, and its steps run as far as they can without an engine."""

import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch.site import KubernetesSite

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "k8s" / "Dockerfile"
EXTRAS = ("train", "prep", "s3")
# Those of torch's wheels for CUDA come with its own exact pins; pip's freeze leaves out setuptools.
NOT_LISTED = ("nvidia-", "triton", "cuda-", "setuptools")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """An instruction of the recipe."""

    stage: str
    word: str
    text: str


def steps_of(text: str) -> list[Step]:
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    found, stage = list[Step](), ""
    for line in joined.splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        rest = " ".join(rest.split())
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.append(Step(stage=stage, word=word, text=rest))
    return found


def lint(text: str) -> list[str]:
    """Every rule that a recipe breaks."""
    steps = steps_of(text)
    arguments = dict(s.text.split("=", 1) for s in steps if s.word == "ARG" and "=" in s.text)
    stages = {step.stage for step in steps if step.stage}
    found = []
    for step in steps:
        found += _image(step, arguments, stages) if step.word == "FROM" else []
        found += _command(step) if step.word == "RUN" else []
        if step.word == "ADD":
            found.append("ADD fetches and unpacks: use COPY")
        if step.word in ("CMD", "ENTRYPOINT") and not step.text.startswith("["):
            found.append(f"{step.word} is not in exec form: a shell would keep signals back")
        if step.word in ("ENV", "ARG") and re.search(r"(?i)password|secret|token|_key", step.text):
            found.append(f"a secret would stay in the image: {step.text}")
        if step.word == "WORKDIR" and not step.text.startswith("/"):
            found.append(f"WORKDIR {step.text} is not absolute")
    for target in ("cuda", "cpu"):
        users = [step.text for step in steps if step.stage == target and step.word == "USER"]
        if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
            found.append(f"{target} does not end as a user by number, which runAsNonRoot can check")
    return found


def _image(step: Step, arguments: dict[str, str], stages: set[str]) -> list[str]:
    image = step.text.split(" AS ")[0]
    for name, value in arguments.items():
        image = image.replace(f"${{{name}}}", value)
    if image in stages:
        return []
    tag = image.rpartition("/")[2].partition(":")[2]
    exact = re.match(r"\d+\.\d+\.\d+-", tag) or "@sha256:" in image
    return [] if exact else [f"{image} is not one exact version"]


def _command(step: Step) -> list[str]:
    text, found = step.text, []
    if "apt-get install" in text:
        if "--no-install-recommends" not in text or "rm -rf /var/lib/apt/lists" not in text:
            found.append("apt-get leaves what nobody asked for")
        if not text.startswith("apt-get update"):
            found.append("apt-get install without update in the same step uses an old list")
    if "pip install" in text and ("--constraint" not in text or "--no-cache-dir" not in text):
        found.append("pip install without constraints or with its cache")
    if "sudo" in text or re.search(r"(curl|wget)[^|]*\|", text):
        found.append(f"{text[:60]}: neither sudo nor a script from the network")
    return found


def test_the_recipe_keeps_its_rules():
    assert lint(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("3.11.14-slim-bookworm", "latest"),
        ("3.11.14-slim-bookworm", "3.11"),
        ("USER 10001:10001", "USER root"),
        ("USER 10001:10001", "USER jepa"),
        ("--no-install-recommends", ""),
        ("rm -rf /var/lib/apt/lists/*", "true"),
        ("--constraint /opt/jepa/constraints.txt", ""),
        ('CMD ["jepa", "--help"]', "CMD jepa --help"),
        ("COPY constraints.txt", "ADD constraints.txt"),
        ("ENV PYTHONUNBUFFERED=1", "ENV AWS_SECRET_ACCESS_KEY=x"),
        ("WORKDIR /data", "WORKDIR data"),
        ("RUN groupadd", "RUN curl https://x.example/install.sh | sh && groupadd"),
    ],
)
def test_a_broken_recipe_is_found_out(old, new):
    text = DOCKERFILE.read_text()
    assert old in text
    assert lint(text.replace(old, new))


def test_the_image_runs_as_the_user_of_the_pods():
    users = {step.text for step in steps_of(DOCKERFILE.read_text()) if step.word == "USER"}
    user = KubernetesSite().user_id
    assert users == {f"{user}:{user}"}
    assert f"useradd --uid {user} --gid {user} --home-dir /scratch" in DOCKERFILE.read_text()


def copied() -> list[str]:
    """What is copied from the checkout."""
    steps = [step for step in steps_of(DOCKERFILE.read_text()) if step.word == "COPY"]
    own = [step.text.split() for step in steps if "--from" not in step.text]
    return [source for words in own for source in words[:-1]]


def test_everything_that_is_copied_is_there_and_sent_to_the_engine():
    kept = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    for source in copied():
        assert (ROOT / source).exists()
        assert f"!{source}" in kept
    assert "*" in kept


def test_every_library_of_the_image_is_pinned():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").open()}
    pinned = {re.sub(r"[-_.]+", "-", name) for name in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    seen, wanted = set[str](), among([*project["dependencies"], *lines], "")
    while wanted:
        name, extra = wanted.pop()
        if f"{name}[{extra}]" in seen:
            continue
        seen.add(f"{name}[{extra}]")
        wanted += needs(name, extra)
    names = {key.partition("[")[0] for key in seen}
    missing = {name for name in names - pinned if not name.startswith(NOT_LISTED)}
    assert not missing
    assert {"torch", "deepspeed", "ray", "av", "s3fs", "h5py"} < names


def needs(name: str, extra: str) -> list[tuple[str, str]]:
    """What an installed library needs here; nothing if it is not installed."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    return among(lines, extra)


def among(lines: list[str], extra: str) -> list[tuple[str, str]]:
    """Name and extras of each library that is wanted here."""
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            plain = re.sub(r"[-_.]+", "-", requirement.name.lower())
            found += [(plain, one) for one in ("", *requirement.extras)]
    return found


def test_the_wheel_of_what_is_copied_is_jepa(tmp_path):
    """The steps of the first stage, and what the last ones install of it."""
    for source in copied():
        if source == "constraints.txt":
            continue
        target = tmp_path / "src" / source
        target.parent.mkdir(exist_ok=True)
        if (ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / source, target, ignore=ignore)
        else:
            shutil.copy(ROOT / source, target)
    step = next(s.text for s in steps_of(DOCKERFILE.read_text()) if "pip wheel" in s.text)
    words = step.replace("/wheels", str(tmp_path / "wheels")).split()[1:]
    # Without the network: setuptools is the one that is installed here.
    run([*words, "--no-build-isolation"], tmp_path / "src")
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    site = tmp_path / "site"
    run(["-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel)], tmp_path)
    shown = run(["-m", "pipeline.cli", "--help"], tmp_path, PYTHONPATH=str(site))
    assert "launch" in shown
    code = "import launch.k8s_pod as pod; print(pod.__file__)"
    assert run(["-c", code], tmp_path, PYTHONPATH=str(site)).startswith(str(site))


def run(words: list[str], folder: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
