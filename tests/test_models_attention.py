"""Every attention kernel against the plain formula, forward and backward, dense and packed."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models import attention_choice, attention_kernels
from pipeline.models.attention import AttentionConfig, attend
from pipeline.models.attention_choice import AttentionShape, choose_attention
from pipeline.models.attention_kernels import Kernel, Qkv, run_groups, why_not
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.packing import packing_of

torch.set_num_threads(1)
CPU = torch.device("cpu")
KERNELS = get_args(Kernel)
ON_CPU = [kernel for kernel in KERNELS if why_not(kernel, CPU, torch.float32) is None]
HEAD_DIMS = [32, 64, 80, 88]
# Shares of the greatest value: a few roundings of the type, as sums are taken in another order.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LENGTHS = (13, 13, 40, 7, 21)
DENSE = (3, 33)


def tensors(size, dtype) -> tuple[Qkv, Tensor]:
    """Query, key and value, strided as the networks give them, and a gradient."""
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(*size[:-2], 3, *size[-2:], generator=generator).to(dtype)
    query, key, value = qkv.unbind(-3)
    return (query, key, value), torch.randn(size, generator=generator).to(dtype)


def forward_backward(function, qkv, gradient):
    inputs = [x.detach().requires_grad_() for x in qkv]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def plain_sequences(query, key, value):
    """The formula in float64, one sequence of `LENGTHS` at a time."""
    parts = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    return torch.cat([plain(*(x[None] for x in part))[0] for part in parts])


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula, [B, N, heads, head_dim]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def assert_near(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        difference = (one.cpu().double() - other.cpu()).abs().max()
        assert difference <= TOLERANCE[dtype] * other.abs().max()


def check_kernel(kernel, head_dim, dtype, device):
    """Dense and packed, forward and backward, against the formula in float64."""
    for size, function, packing in (
        ((*DENSE, 2, head_dim), plain, None),
        ((sum(LENGTHS), 2, head_dim), plain_sequences, packing_of(LENGTHS, device)),
    ):
        qkv, gradient = tensors(size, dtype)
        exact = forward_backward(function, [x.double() for x in qkv], gradient.double())
        found = forward_backward(
            lambda q, k, v, packing=packing: attend(q, k, v, kernel, packing),
            [x.to(device) for x in qkv],
            gradient.to(device),
        )
        assert_near(found, exact, dtype)


def test_the_cpu_has_the_kernels_that_torch_gives_it():
    assert ON_CPU == ["math", "sdpa", "sdpa-flash", "sdpa-math"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_kernels_equal_the_formula_dense_and_packed_with_their_gradients(kernel, head_dim, dtype):
    check_kernel(kernel, head_dim, dtype, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_equal_the_formula_on_a_gpu(kernel, head_dim, dtype):
    device = torch.device("cuda")
    reason = why_not(kernel, device, dtype) if torch.cuda.is_available() else "there is no GPU"
    if reason is not None:
        pytest.skip(reason)
    check_kernel(kernel, head_dim, dtype, device)


def test_packed_sequences_do_not_see_each_other():
    qkv, _ = tensors((sum(LENGTHS), 2, 32), torch.float32)
    packing = packing_of(LENGTHS, CPU)
    before = attend(*qkv, "sdpa", packing)
    qkv[1][-1] += 3.0
    after = attend(*qkv, "sdpa", packing)
    assert torch.equal(before[: -LENGTHS[-1]], after[: -LENGTHS[-1]])
    assert not torch.equal(before[-LENGTHS[-1] :], after[-LENGTHS[-1] :])


def test_consecutive_sequences_of_one_length_are_one_dense_call():
    calls = []

    def dense(qkv):
        calls.append(tuple(qkv[0].shape))
        return qkv[2]

    qkv, _ = tensors((sum(LENGTHS), 2, 32), torch.float32)
    out = run_groups(dense, qkv, packing_of(LENGTHS, CPU).runs())
    assert calls == [(2, 13, 2, 32), (1, 40, 2, 32), (1, 7, 2, 32), (1, 21, 2, 32)]
    assert torch.equal(out, qkv[2])


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel not in ON_CPU])
def test_a_kernel_that_cannot_run_here_says_why_in_one_line(kernel):
    qkv, _ = tensors((*DENSE, 2, 32), torch.float32)
    with pytest.raises(ConfigError, match="runs on NVIDIA GPUs, not on cpu") as caught:
        attend(*qkv, kernel)
    assert "fastest" in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_package_with_another_shape_than_expected_is_a_reason_and_no_crash(monkeypatch):
    """Only the shell of a package is there, as when just its newer sibling is installed."""
    library = attention_kernels._LIBRARIES["flash3"]
    empty = attention_kernels._Library(module="json", packed=library.packed, dense=library.dense)
    monkeypatch.setitem(attention_kernels._LIBRARIES, "flash3", empty)
    attention_kernels._functions.cache_clear()
    try:
        reason = why_not("flash3", torch.device("cuda"), torch.bfloat16)
    finally:
        attention_kernels._functions.cache_clear()
    assert str(reason).startswith("json cannot be imported: module 'json' has no attribute")


@pytest.mark.parametrize("kernel", ["flash2", "flash3", "flash4", "varlen"])
def test_packages_are_called_by_their_own_names_and_padded_to_their_widths(kernel, monkeypatch):
    """The calling convention alone, with the formula in the package's place; the rest needs a
    GPU."""
    library, seen = attention_kernels._LIBRARIES[kernel], []

    def packed(q, k, v, **given):
        seen.append((q.shape[-1], given[library.limits[2]]))
        assert set(given) == {*library.limits, library.scale}
        sizes = given[library.limits[0]].diff().tolist()
        parts = zip(*(x.split(sizes) for x in (q * given[library.scale], k, v)), strict=True)
        width = q.shape[-1] ** 0.5
        return torch.cat([plain(width * a[None], b[None], c[None])[0] for a, b, c in parts]), None

    monkeypatch.setattr(attention_kernels, "_functions", lambda _kernel: (packed, packed))
    monkeypatch.setattr(
        attention_kernels, "_arguments", lambda _function: frozenset(library.limits)
    )
    qkv, _ = tensors((sum(LENGTHS), 2, 28), torch.float32)
    out = attention_kernels.run_packed(kernel, qkv, packing_of(LENGTHS, CPU))
    torch.testing.assert_close(out, plain_sequences(*qkv), atol=1e-5, rtol=1e-5)
    assert seen == [(64 if kernel == "flash4" else 32, 40)]


SHAPES = [
    AttentionShape(
        name="teacher", lengths=(24, 24), heads=2, head_dim=32, packed=False, backward=False
    ),
    AttentionShape(name="context", lengths=LENGTHS, heads=2, head_dim=32, packed=True),
]


def test_fastest_times_what_runs_here_and_gives_a_reason_for_the_rest():
    teacher, context = choose_attention(SHAPES, CPU, torch.float32, rounds=1)
    for choice in (teacher, context):
        timed = {one.kernel for one in choice.timings if one.milliseconds is not None}
        assert timed == {"sdpa", "sdpa-flash"}
        assert choice.kernel in timed
        assert all(one.reason for one in choice.timings if one.kernel not in timed)
        assert [one.kernel for one in choice.timings] == list(KERNELS)
    lines = context.lines()
    assert lines[0] == "context: 5 sequences of up to 40 tokens, 2 heads of 32"
    assert [line for line in lines if line.startswith(f"  * {context.kernel} ")]


def test_a_kernel_that_fails_or_gives_other_results_is_not_chosen(monkeypatch):
    def attend_badly(query, key, value, kernel, packing):
        if kernel == "sdpa-flash":
            raise RuntimeError("no kernel image\nfor this device")
        out = attend(query, key, value, "sdpa", packing)
        return out * 1.5 if kernel == "flash2" else out

    runs = {"sdpa", "sdpa-flash", "sdpa-cudnn", "flash2"}
    monkeypatch.setattr(attention_choice, "attend", attend_badly)
    monkeypatch.setattr(
        attention_choice, "why_not", lambda kernel, *_: None if kernel in runs else "not here"
    )
    (choice,) = choose_attention(SHAPES[1:], CPU, torch.float32, rounds=1)
    reasons = {one.kernel: one.reason for one in choice.timings}
    assert reasons["sdpa-flash"] == "no kernel image"
    assert reasons["flash2"].startswith("differs from sdpa by 0.5")
    assert reasons["flash4"] == "not here"
    assert choice.kernel in ("sdpa", "sdpa-cudnn")


def test_fastest_is_torchs_own_choice_until_another_is_set():
    torch.manual_seed(0)
    config = EncoderConfig(width=64, heads=2, depth=2, patch_size=4)
    fastest, sdpa = (
        Encoder(config, attention=AttentionConfig(backend=name)) for name in ("fastest", "sdpa")
    )
    fastest.load_state_dict(sdpa.state_dict())
    video = torch.randn(1, 3, 4, 16, 16)
    assert torch.equal(fastest(video), sdpa(video))
    fastest.backend = "math"
    assert not torch.equal(fastest(video), sdpa(video))
    torch.testing.assert_close(fastest(video), sdpa(video), atol=1e-5, rtol=1e-5)
