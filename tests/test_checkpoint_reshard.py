"""Any slice of any tensor, however the ranks that wrote it had cut it."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.checkpoint import layout
from pipeline.checkpoint.fingerprint import combine_ranks, fingerprint_pieces
from pipeline.checkpoint.inspect import tensor_problems
from pipeline.checkpoint.pieces import Piece, metadata_of, share
from pipeline.checkpoint.reshard import CommitTensors
from pipeline.errors import CheckpointError

SHAPES = {"encoder.w": (5, 7), "teacher.b": (3,), "exp_avg/encoder.w": (5, 7), "step/encoder.w": ()}


def whole(name: str) -> torch.Tensor:
    numel = torch.Size(SHAPES[name]).numel()
    return torch.arange(numel).float().add(100 * list(SHAPES).index(name)).reshape(SHAPES[name])


def write_commit(folder: Path, ranks: list[list[Piece]]) -> Path:
    """Files of each rank and a manifest that lists them; digests are not what is tested here."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for rank, pieces in enumerate(ranks):
        for is_optimizer, path in ((False, layout.weights_name), (True, layout.optimizer_name)):
            own = [piece for piece in pieces if piece.is_optimizer_state is is_optimizer]
            if own:
                flat = {piece.name: piece.flat.clone() for piece in own}
                save_file(flat, folder / path(rank), metadata_of(own))
    manifest = layout.Manifest(
        schema_version=layout.SCHEMA_VERSION,
        run_id="r",
        step=1,
        world_size=len(ranks),
        parent_step=None,
        created="",
        versions={},
        files=tuple(
            layout.FileEntry(path=path.name, num_bytes=0, sha256="")
            for path in sorted(folder.iterdir())
        ),
        fingerprints=combine_ranks(fingerprint_pieces(pieces) for pieces in ranks),
    )
    (folder / layout.MANIFEST).write_text(manifest.to_json())
    return folder


def piece(name: str, start: int, stop: int) -> Piece:
    flat = whole(name).flatten()[start:stop]
    return Piece(name=name, shape=SHAPES[name], start=start, flat=flat)


def cut_like_zero3(world_size: int) -> list[list[Piece]]:
    ranks = []
    for rank in range(world_size):
        cuts = {n: share(torch.Size(s).numel(), rank, world_size) for n, s in SHAPES.items()}
        own = [piece(name, cut.start, cut.stop) for name, cut in cuts.items()]
        ranks.append([one for one in own if one.flat.numel()])
    return ranks


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_slice_is_what_it_was_however_ranks_had_cut(data, tmp_path):
    num_ranks = data.draw(st.integers(1, 4), label="ranks")
    ranks: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        cuts = data.draw(st.lists(st.integers(0, numel), min_size=0, max_size=num_ranks - 1))
        borders = sorted({0, numel, *cuts})
        owners = data.draw(st.permutations(range(num_ranks)))
        for owner, start, stop in zip(owners, borders, borders[1:], strict=False):
            ranks[owner].append(piece(name, start, stop))
    folder = write_commit(tmp_path / "commit", ranks)
    assert tensor_problems(folder) == []
    world_size = data.draw(st.integers(1, 5), label="world")
    rank = data.draw(st.integers(0, world_size - 1), label="rank")
    with CommitTensors(folder, rank=rank, world_size=world_size) as tensors:
        for name, shape in data.draw(st.permutations(list(SHAPES.items()))):
            assert tensors.shape_of(name) == shape
            numel = torch.Size(shape).numel()
            start = data.draw(st.integers(0, numel))
            stop = data.draw(st.integers(start, numel))
            assert tensors.read(name, start, stop).equal(whole(name).flatten()[start:stop])
            assert tensors.whole(name).equal(whole(name))
        assert tensors.shape_of("encoder.other") is None


def test_at_its_own_world_size_a_rank_opens_its_own_files_and_the_first_ones(tmp_path):
    folder = write_commit(tmp_path / "commit", cut_like_zero3(4))
    for rank in (1, 3):
        # Any rank but the asking one and the first could be gone.
        (folder / layout.weights_name(rank)).rename(tmp_path / f"weights-{rank}")
        (folder / layout.optimizer_name(rank)).rename(tmp_path / f"optimizer-{rank}")
    with CommitTensors(folder, rank=2, world_size=4) as tensors:
        for name in ("encoder.w", "teacher.b", "exp_avg/encoder.w"):
            cut = share(whole(name).numel(), 2, 4)
            assert tensors.shape_of(name) == SHAPES[name]
            assert tensors.read(name, cut.start, cut.stop).equal(whole(name).flatten()[cut])
        assert tensors.read("step/encoder.w", 0, 1).tolist() == [whole("step/encoder.w").item()]


def test_elements_that_no_file_holds_or_two_hold_are_named(tmp_path):
    pieces = [[piece("encoder.w", 0, 10)], [piece("encoder.w", 12, 35)]]
    folder = write_commit(tmp_path / "gap", pieces)
    assert tensor_problems(folder) == ["tensor encoder.w: elements from 10 on are missing"]
    with CommitTensors(folder) as tensors, pytest.raises(CheckpointError, match="element 10 of"):
        tensors.whole("encoder.w")
    pieces = [[piece("encoder.w", 0, 10)], [piece("encoder.w", 8, 35)]]
    folder = write_commit(tmp_path / "twice", pieces)
    assert tensor_problems(folder) == ["tensor encoder.w: elements from 8 on are there twice"]


@pytest.mark.gpu
def test_a_fingerprint_taken_on_a_gpu_is_that_of_the_cpu():
    flat = torch.randn(200_000)
    there = fingerprint_pieces([Piece(name="w", shape=(200_000,), start=7, flat=flat.cuda())])
    here = fingerprint_pieces([Piece(name="w", shape=(200_000,), start=7, flat=flat)])
    assert there == here
