"""A copy in host memory is that of its moment, and the same buffers serve every save."""

import pytest
import torch

from pipeline.checkpoint.pieces import Piece
from pipeline.checkpoint.staging import HostCopies


def pieces(device: str, value: float, size: int = 1000) -> list[Piece]:
    whole = torch.full((2 * size,), value, device=device)
    return [
        Piece(name=name, shape=(2 * size,), start=start, flat=whole[start : start + size])
        for name, start in (("a", 0), ("b", size))
    ]


def test_a_copy_does_not_follow_what_it_was_taken_from():
    live = pieces("cpu", 1.0)
    copies = HostCopies().take(live)
    live[0].flat.fill_(7.0)
    assert [(c.name, c.shape, c.start) for c in copies] == [("a", (2000,), 0), ("b", (2000,), 1000)]
    assert all(copy.flat.eq(1.0).all() for copy in copies)
    storages = {copy.flat.untyped_storage().data_ptr() for copy in copies}
    assert len(storages) == 2, "safetensors refuses views of one storage"


def test_buffers_are_used_again_and_follow_a_change_of_size_or_kind():
    host = HostCopies()
    first = [copy.flat.data_ptr() for copy in host.take(pieces("cpu", 1.0))]
    again = host.take(pieces("cpu", 2.0))
    assert [copy.flat.data_ptr() for copy in again] == first
    assert all(copy.flat.eq(2.0).all() for copy in again)
    other = host.take(pieces("cpu", 3.0, size=10))
    assert [len(copy.flat) for copy in other] == [10, 10]
    half = [Piece(name="a", shape=(4,), start=0, flat=torch.ones(4, dtype=torch.bfloat16))]
    assert host.take(half)[0].flat.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_copy_beside_other_work_on_a_gpu_is_that_of_the_moment_it_was_asked_for():
    from pipeline.engine.save import RankFiles  # noqa: PLC0415 - needs no GPU elsewhere

    live = pieces("cuda", 1.0, size=1 << 24)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        busy = busy @ busy
        live[0].flat.add_(0.0)
    ready = torch.cuda.Event()
    ready.record()
    files = RankFiles(rank=0, pieces=live, generators={}, state={}, ready=ready)
    copies = files.copied(HostCopies()).pieces
    live[0].flat.fill_(7.0)
    torch.cuda.synchronize()
    assert all(copy.flat.is_pinned() for copy in copies)
    assert all(copy.flat.eq(1.0).all() for copy in copies)
