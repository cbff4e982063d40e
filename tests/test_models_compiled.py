"""Compiled blocks against plain ones, and how often code is generated for them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.clip import Grid, MaskSet
from pipeline.errors import ConfigError
from pipeline.models import compiled
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.predictor import Predictor, PredictorConfig

torch.set_num_threads(1)
ENCODER = EncoderConfig(width=48, heads=2, depth=3, patch_size=4)
PREDICTOR = PredictorConfig(width=24, heads=2, depth=2)
GRID = Grid(t=2, h=4, w=4)


def networks():
    torch.manual_seed(0)
    attention = AttentionConfig()
    return Encoder(ENCODER, attention=attention), Predictor(
        PREDICTOR, encoder_width=48, attention=attention
    )


def masks(*sizes):
    """One mask of two clips for each size of context, the rest its target."""
    order = torch.arange(GRID.num_tokens).expand(2, -1)
    return [MaskSet(context_BK=order[:, :size], target_BK=order[:, size:]) for size in sizes]


def step(encoder, predictor, found):
    """Predictions and gradients of one pass over the masks."""
    video = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    out = predictor(encoder(video, found), found, GRID)
    parameters = [*encoder.parameters(), *predictor.parameters()]
    return [out, *torch.autograd.grad(out.square().mean(), parameters)]


def assert_equal_steps(plain, pair, sizes, tolerance=1e-6):
    for one, other in zip(step(*plain, masks(*sizes)), step(*pair, masks(*sizes)), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=1e-4)


def test_compiled_blocks_give_the_plain_ones_results_and_gradients_recomputed_or_not():
    plain, pair = networks(), networks()
    for network in pair:
        network.compile_blocks(dynamic=True, backend="aot_eager")
        network.num_recomputed_blocks = 1
    assert_equal_steps(plain, pair, (9, 4))


def test_code_is_generated_once_for_all_blocks_and_all_token_counts():
    """Two pieces a network, one before and one after the attention kernel."""
    counter = CompileCounterWithBackend("eager")
    encoder, predictor = networks()
    for network in (encoder, predictor):
        network.compile_blocks(dynamic=True, backend=counter)
    for sizes in ((9, 4), (11, 5), (7, 3, 8), (20,)):
        step(encoder, predictor, masks(*sizes))
    assert counter.frame_count == 4


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(compiled, "_has_cpp_compiler", lambda: False)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler") as caught:
        networks()[0].compile_blocks()
    assert "switch compilation off" in caught.value.remedy


@pytest.mark.slow
def test_code_generated_for_the_cpu_gives_the_plain_results():
    plain, pair = networks(), networks()
    for network in pair:
        network.compile_blocks(dynamic=True)
    for sizes in ((9, 4), (6, 3)):
        assert_equal_steps(plain, pair, sizes, tolerance=1e-5)
