"""Whatever becomes of the bytes of a checkpoint: it is noticed, or nothing changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.checkpoint import layout
from pipeline.checkpoint.fingerprint import fingerprint_pieces
from pipeline.checkpoint.inspect import tensor_problems
from pipeline.checkpoint.load import find_commit, verify
from pipeline.checkpoint.pieces import Piece, metadata_of, share
from pipeline.checkpoint.save import SaveRequest, save
from pipeline.errors import CheckpointError

STEPS = (1, 2, 3)
Files = dict[str, bytes]


def write_two_ranks(folder: Path, seed: int) -> dict[str, int]:
    """What two ranks of a tiny run write: weights, Adam's state, generators, state."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for rank in (0, 1):
        own = []
        for name in ("encoder.w", "teacher.w", "exp_avg/encoder.w"):
            flat = torch.randn(7, generator=generator)[: 7 - 3 * rank]
            start = share(7, rank, 2).start
            own.append(Piece(name=name, shape=(7,), start=start, flat=flat[: 4 if not rank else 3]))
        for path, part in (
            (layout.weights_name(rank), own[:2]),
            (layout.optimizer_name(rank), own[2:]),
        ):
            flat = {piece.name: piece.flat.clone() for piece in part}
            save_file(flat, folder / path, metadata_of(part))
        save_file({"torch": torch.zeros(8)}, folder / layout.rng_name(rank))
        pieces.append(fingerprint_pieces(own))
    (folder / layout.STATE).write_text(json.dumps({"step": seed % 100}))
    return {name: sum(part[name] for part in pieces) for name in pieces[0]}


def write_run(run: Path, run_id: str, offset: int) -> Path:
    for step in STEPS:
        request = SaveRequest(
            run_dir=run,
            run_id=run_id,
            step=step,
            parent_step=step - 1,
            versions={"torch": "2"},
            write=lambda folder, step=step: write_two_ranks(folder, offset + step),
        )
        assert save(request).failure is None
    return run


def content_of(folder: Path) -> Files:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pristine")
    return write_run(folder / "mine", "mine", 100), write_run(folder / "other", "other", 200)


def any_file(data, run: Path) -> Path:
    files = sorted(layout.checkpoints_dir(run).glob("step-*/*"))
    files = [path for path in files if path.stat().st_size]
    return data.draw(st.sampled_from(files), label="file")


def flip(data, run, _other):
    path = any_file(data, run)
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1), label="bit")
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def overwrite(data, run, _other):
    path = any_file(data, run)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1), label="place")
    new = data.draw(st.binary(min_size=1, max_size=40) | st.just(bytes(64)), label="bytes")
    content[place : place + len(new)] = new[: len(content) - place]
    path.write_bytes(content)


def truncate(data, run, _other):
    path = any_file(data, run)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1), label="length")])


def extend(data, run, _other):
    path = any_file(data, run)
    path.write_bytes(path.read_bytes() + data.draw(st.binary(min_size=1, max_size=9)))


def swap(data, run, _other):
    """Within a commit or between two of them."""
    first, second = any_file(data, run), any_file(data, run)
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def take_from_elsewhere(data, run, other):
    """A file of the same name from another run, or from an older commit; manifests too."""
    path, step = any_file(data, run), data.draw(st.sampled_from(STEPS))
    source = layout.checkpoints_dir(data.draw(st.sampled_from([run, other])))
    source = source / layout.commit_name(step) / path.name
    if source.exists():
        path.write_bytes(source.read_bytes())


def delete(data, run, _other):
    any_file(data, run).unlink()


def duplicate(data, run, _other):
    path = any_file(data, run)
    copy = path.with_name(data.draw(st.sampled_from(["copy", "weights-rank00002"])))
    if copy != path:
        shutil.copy(path, copy)


def exchange_folders(data, run, other):
    """Two commits under each other's name, or one of another run."""
    target = layout.checkpoints_dir(run) / layout.commit_name(data.draw(st.sampled_from(STEPS)))
    step = data.draw(st.sampled_from(STEPS))
    source = layout.checkpoints_dir(data.draw(st.sampled_from([run, other])))
    source = source / layout.commit_name(step)
    if source.exists() and source != target:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


MUTATIONS: tuple[Callable, ...] = (
    flip,
    overwrite,
    truncate,
    extend,
    swap,
    take_from_elsewhere,
    delete,
    duplicate,
    exchange_folders,
)


@settings(
    max_examples=1100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_damage_goes_unnoticed_and_the_newest_whole_commit_is_found(runs, tmp_path, data):
    mine, other = runs
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(mine, run)
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 3]), label="mutations")):
        data.draw(st.sampled_from(MUTATIONS))(data, run, other)
    pristine, found_now = content_of(mine), content_of(run)
    whole = [step for step in STEPS if part(found_now, step) == part(pristine, step)]
    if not whole:
        with pytest.raises(CheckpointError):
            find_commit(run, run_id="mine")
        return
    found = find_commit(run, run_id="mine")
    assert found.commit.step == max(whole)
    newer = {step for step in STEPS if step > max(whole) and part(found_now, step)}
    assert {bad.commit.step for bad in found.rejected} == newer
    assert all(bad.reasons for bad in found.rejected)


def part(files: Files, step: int) -> Files:
    prefix = f"checkpoints/{layout.commit_name(step)}/"
    return {path: content for path, content in files.items() if path.startswith(prefix)}


def test_a_rejected_commit_is_told_with_the_file_and_the_reason(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    path = layout.checkpoints_dir(run) / "step-00000003" / layout.weights_name(1)
    path.write_bytes(path.read_bytes()[:-1])
    (layout.checkpoints_dir(run) / "step-00000002" / layout.MANIFEST).unlink()
    found = find_commit(run)
    assert found.commit.step == 1
    first, second = map(str, found.rejected)
    assert first.startswith("step 3: file weights-rank00001.safetensors has ")
    assert second.startswith("step 2: ")
    assert second.endswith("has no manifest.json: it is not a checkpoint.")


def test_tensors_that_are_not_what_the_ranks_held_are_named_though_all_digests_fit(tmp_path):
    def write_wrongly(folder: Path) -> dict[str, int]:
        told = write_two_ranks(folder, 1)
        return {**told, "teacher.w": told["teacher.w"] + 1, "encoder.b": 5}

    request = SaveRequest(
        run_dir=tmp_path, run_id="r", step=1, parent_step=None, versions={}, write=write_wrongly
    )
    assert save(request).failure is None
    commit = find_commit(tmp_path).commit
    assert verify(commit.path) == []
    wrong, missing = tensor_problems(commit.path)
    assert wrong.startswith("tensor teacher.w: fingerprint ")
    assert missing == "tensor encoder.b is missing"
