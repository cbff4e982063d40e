"""Hostile files: nothing they hold is executed, nothing is written beside them."""

import ast
import io
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.load import load_config
from pipeline.data import indexing
from pipeline.data.format import BadMediaError, ShardIndex
from pipeline.data.indexing import index_shard
from pipeline.data.layout import INDEX_NAME, KEY_PATTERN, SUFFIXES, Member
from pipeline.data.manifest import file_sha256
from pipeline.errors import ConfigError, DataError, JepaError
from pipeline.exchange import official
from pipeline.run import RunConfig
from tests.shards import write_dataset
from tests.test_format_hostile import add
from tests.test_format_index import members_of, tampered_manifest, write_tar
from tests.test_project_rules import dotted

CODE = sorted(
    p for folder in ("pipeline", "data_prep", "launch") for p in Path(folder).rglob("*.py")
)
# What each call has to say, so that it cannot run what it reads.
SAFE_LOADS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
NEVER = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub.load", "yaml.load", "eval"),
    *("exec", "os.system", "os.popen", "marshal.loads", "shelve.open", "tempfile.mktemp"),
}
NEVER_METHODS = {"extractall", "extract", "load_checkpoint"}


class Payload:
    """Unpickling it makes a file: the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(path)))  # noqa: S301 - ours: proves that it would work
    assert path.is_dir()
    path.rmdir()
    yield path
    assert not path.exists(), "the payload was executed"


def calls() -> list[tuple[str, ast.Call]]:
    return [
        (f"{path}:{node.lineno}", node)
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def unsafe(call: ast.Call) -> bool:
    name = dotted(call.func)
    said = {word.arg: ast.literal_eval(word.value) for word in call.keywords if is_plain(word)}
    if name in SAFE_LOADS:
        option, value = SAFE_LOADS[name]
        return said.get(option) is not value
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return name in NEVER or method in NEVER_METHODS or said.get("shell") is True


def is_plain(word: ast.keyword) -> bool:
    return isinstance(word.value, ast.Constant)


def test_no_code_of_ours_reads_what_could_run_as_code():
    assert [place for place, call in calls() if unsafe(call)] == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=True)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("pickle.loads(x)", True),
        ("tar.extractall(x)", True),
        ("subprocess.run(x, shell=True)", True),
        ("json.loads(x)", False),
    ],
)
def test_the_rule_tells_unsafe_calls_from_safe_ones(code, expected):
    assert unsafe(ast.parse(code).body[0].value) is expected


def objects(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_a_pickle_as_the_index_is_refused(tmp_path, canary):
    folder = write_dataset(tmp_path / "set", 4)
    (folder / INDEX_NAME).write_bytes(objects(canary))
    tampered_manifest(folder, index_sha256=file_sha256(folder / INDEX_NAME))
    with pytest.raises(DataError, match="not an index"):
        ShardIndex.open(folder)


def test_a_pickle_as_a_member_is_a_bad_sample(tmp_path, canary):
    content = objects(canary)
    folder = write_dataset(tmp_path / "set", 4, extra=lambda _: {"states.npy": content})
    index = ShardIndex.open(folder)
    with pytest.raises(BadMediaError, match=r"states\.npy"):
        index.read_array(index.record(0), Member.STATES)


def test_a_pickle_as_a_foreign_checkpoint_is_refused(tmp_path, canary):
    path = tmp_path / "official.pt"
    torch.save({"encoder": Payload(canary)}, path)
    with pytest.raises(JepaError, match="could run code"):
        official.load_pickle(path)
    path.write_bytes(pickle.dumps({"encoder": Payload(canary)}))
    with pytest.raises(JepaError):
        official.load_pickle(path)


def test_a_pickle_in_a_configuration_is_refused(tmp_path, canary):
    path = tmp_path / "run.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{canary}']\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:1"):
        load_config(path, RunConfig)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "\n".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]"
            for i in range(12)
        ),
        "[" * 100_000,
        "{a: " * 50_000,
        "a: " + "9" * 200_000,
        "? " * 50_000,
        "- " * 100_000,
    ],
    ids=["laughs", "brackets", "braces", "digits", "keys", "dashes"],
)
def test_a_yaml_bomb_is_refused_in_less_than_five_seconds(tmp_path, text):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    begin = time.process_time()
    with pytest.raises(ConfigError):
        load_config(path, RunConfig)
    assert time.process_time() - begin < 5.0


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1)
HOSTILE = st.one_of(
    NAMES,
    st.builds("../{}.mp4".format, NAMES),
    st.builds("/{}.mp4".format, NAMES),
    st.builds("{}/../../x.json".format, NAMES),
    st.builds("{}\n.mp4".format, NAMES),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=HOSTILE)
def test_any_member_name_is_a_samples_own_or_refused_and_never_written(tmp_path, name):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, name[:200])
    key, _, suffix = name.partition(".")
    assert not (KEY_PATTERN.fullmatch(key) and suffix in SUFFIXES.values() and len(name) < 60)
    with pytest.raises(DataError, match="unexpected member name"):
        index_shard(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.tar"]


def test_a_member_that_claims_to_be_huge_is_refused_unread(tmp_path):
    info = tarfile.TarInfo("a.json")
    info.size = 1 << 40
    (tmp_path / "s.tar").write_bytes(info.tobuf() + b"x" * 1024)
    with pytest.raises(DataError, match=r"'a\.json' has 1099511627776 bytes"):
        index_shard(tmp_path / "s.tar")


def test_a_tar_with_members_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "_MAX_MEMBERS_PER_SHARD", 50)
    write_tar(tmp_path / "s.tar", [members_of(f"k{number}", b"1") for number in range(30)])
    with pytest.raises(DataError, match="too many members"):
        index_shard(tmp_path / "s.tar")


WORKER = """
import sys
import pipeline.data.worker_imports
from webdataset.gopen import gopen
from webdataset import autodecode
try:
    gopen("pipe:touch " + sys.argv[1])
except Exception as error:
    print("refused:", error)
try:
    autodecode.unpickle_loads(b"x")
except Exception as error:
    print("refused:", error)
"""


def test_a_worker_opens_no_pipe_whatever_the_environment_says(tmp_path):
    env = {**os.environ, "WDS_SECURE": "0"}
    command = [sys.executable, "-c", WORKER, str(tmp_path / "made")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "refused" in done.stdout
    assert not (tmp_path / "made").exists()
