"""The teacher's average is fp32 and follows every parameter, whatever the teacher computes in."""

import pytest
import torch

from pipeline.models.teacher import AveragedShard, TeacherAverage


def average_of(student: torch.Tensor, storage: torch.Tensor) -> TeacherAverage:
    shard = AveragedShard(
        name="w",
        numel=student.numel(),
        shape=tuple(student.shape),
        student_fp32=lambda: student,
        storage=storage,
    )
    return TeacherAverage(shards=[shard], refresh=lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slow_average_moves_as_the_formula_says_also_when_stored_in_bf16(dtype):
    student = torch.full((5,), 1.0)
    storage = torch.empty(5, dtype=dtype)
    average = average_of(student, storage)
    student += 1.0
    for _ in range(1000):
        average.update(0.99925)
    expected = 2.0 - 0.99925**1000
    torch.testing.assert_close(average.pieces()["w"], torch.full((5,), expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(storage.float(), torch.full((5,), expected), atol=0.008, rtol=0)


def test_an_average_kept_in_bf16_alone_would_stand_still():
    naive = torch.full((5,), 1.0, dtype=torch.bfloat16)
    for _ in range(1000):
        naive.lerp_(torch.full((5,), 2.0, dtype=torch.bfloat16), 1 - 0.99925)
    assert (naive == 1.0).all(), "the reason for keeping fp32 is gone: simplify the teacher"


def test_the_teacher_starts_as_a_copy_and_restores_what_was_saved():
    student, storage = torch.randn(7), torch.empty(7)
    average = average_of(student, storage)
    assert storage.equal(student)
    saved = {name: piece.clone() for name, piece in average.pieces().items()}
    student.add_(1.0)
    average.update(0.5)
    assert not storage.equal(saved["w"])
    average.load(saved)
    assert storage.equal(saved["w"])


def test_a_piece_of_another_length_or_none_is_refused():
    average = average_of(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="expected a piece of 4"):
        average.load({"w": torch.zeros(5)})
    with pytest.raises(KeyError):
        average.load({})
