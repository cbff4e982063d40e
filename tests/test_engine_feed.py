"""Micro-batches come in order whatever is fetched ahead, and a step waits for its GPU once."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.bench.batches import noise_batches
from pipeline.bench.step import OwnStep, measuring
from pipeline.clip import ClipBatch, Progress
from pipeline.engine.agree import RankWord, agree
from pipeline.engine.feed import DeviceFeed
from pipeline.engine.stop import StopReason
from pipeline.errors import DataError
from tests.plain import tiny_config

CPU = torch.device("cpu")


class Source:
    """An iterator with the loader's face: some batches, then a failure."""

    def __init__(self, batches: tuple[ClipBatch, ...]) -> None:
        self.wait_seconds = 0.0
        self._batches: Iterator[ClipBatch] = iter(batches)
        self.num_asked = 0

    def __next__(self) -> ClipBatch:
        self.num_asked += 1
        self.wait_seconds = float(self.num_asked)
        try:
            return next(self._batches)
        except StopIteration:
            raise DataError("no more") from None


def _hands_out_in_order(device: torch.device, *, asked_ahead: int) -> None:
    batches = noise_batches(tiny_config(), 0, CPU, 3)
    source = Source(batches)
    feed = DeviceFeed(source, device)
    for number, batch in enumerate(batches):
        taken = feed.take()
        assert taken.keys == batch.keys
        assert taken.video_BCTHW.device.type == device.type
        assert torch.equal(taken.video_BCTHW.cpu(), batch.video_BCTHW)
        assert feed.wait_seconds == number + 1
        feed.ahead()
        feed.ahead()
        assert source.num_asked == number + 1 + asked_ahead
    with pytest.raises(DataError):
        feed.take()


def test_on_a_cpu_nothing_is_fetched_ahead():
    _hands_out_in_order(CPU, asked_ahead=0)


def test_the_next_batch_is_fetched_when_the_forward_pass_is_queued():
    config = tiny_config(0)
    with measuring() as device:
        batch = noise_batches(config, 0, device, 1)[0]
        step = OwnStep(config, device)
        weights = list(step.engine.objective.modules().parameters())
        had_gradients = []
        step.engine.forward_backward(
            batch,
            Progress(step=1, total_steps=config.num_steps, stage=0),
            accumulation=1,
            last=True,
            meanwhile=lambda: had_gradients.append(any(p.grad is not None for p in weights)),
        )
        # Once, and before the backward pass, which waits for the device.
        assert had_gradients == [False]
        assert any(p.grad is not None for p in weights)


@pytest.mark.gpu
def test_on_a_gpu_one_batch_is_fetched_ahead_and_its_failure_kept():
    _hands_out_in_order(torch.device("cuda"), asked_ahead=1)


@pytest.mark.gpu
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_forward_and_backward_are_queued_without_waiting_for_the_gpu(zero_stage):
    config = tiny_config(zero_stage, precision="bf16")
    with measuring() as device:
        batch = noise_batches(config, 0, device, 1)[0]
        step = OwnStep(config, device)
        for _ in range(2):
            step.take(batch)
        progress = Progress(step=3, total_steps=config.num_steps, stage=0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = step.engine.forward_backward(batch, progress, accumulation=1, last=True)
            square = step.engine.gradient_square()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        agreed = agree(
            RankWord(
                loss=losses.total,
                terms=losses.terms,
                data_wait_seconds=0.0,
                num_faults=0,
                flops=1.0,
                stop=StopReason.NONE,
                gradient_square=square,
            )
        )
        step.engine.update(1e-4, 0.0, gradient_norm=agreed.gradient_norm)
        assert agreed.gradient_norm > 0
