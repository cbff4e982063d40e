"""A fingerprint asks for the bits and nothing else: not for pieces, ranks, devices or order."""

import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint import fingerprint
from pipeline.checkpoint.fingerprint import as_signed, combine, fingerprint_piece, to_text

NUMEL = 100_003  # four blocks, the last one short


@pytest.fixture(scope="module")
def flat() -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))


def test_it_is_the_sum_that_its_definition_says():
    values = torch.tensor([1.5, -2.0, 0.0, -0.0, float("nan")])
    bits = [0x3FC00000, 0xC0000000, 0, 0x80000000, 0x7FC00000]
    signed = [b - (1 << 32) if b >> 31 else b for b in bits]
    start = (1 << 15) - 2  # the piece lies across a border of blocks
    expected = 0
    for index, value in enumerate(signed, start):
        block, offset = divmod(index, 1 << 15)
        factor = fingerprint._factor(block) * fingerprint._factor(-1 - offset)
        expected += factor * (value + (1 << 32))
    assert fingerprint_piece(values, start) == expected % (1 << 64)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, NUMEL), max_size=8), seed=st.integers(0, 99))
def test_any_cut_into_pieces_added_in_any_order_gives_the_same(flat, cuts, seed):
    borders = [0, *sorted(cuts), NUMEL]
    parts = [fingerprint_piece(flat[start:stop], start) for start, stop in pairwise(borders)]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    assert combine(parts[place] for place in order) == fingerprint_piece(flat, 0)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, NUMEL - 1), bit=st.integers(0, 31))
def test_every_flipped_bit_changes_it(flat, place, bit):
    changed = flat.clone()
    changed.view(torch.int32)[place] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert fingerprint_piece(changed, 0) != fingerprint_piece(flat, 0)


@settings(max_examples=150, deadline=None)
@given(first=st.integers(0, NUMEL - 1), second=st.integers(0, NUMEL - 1))
def test_swapped_elements_change_it(flat, first, second):
    changed = flat.clone()
    changed[first], changed[second] = flat[second], flat[first]
    same = fingerprint_piece(changed, 0) == fingerprint_piece(flat, 0)
    assert same == (flat[first] == flat[second])


def test_zeros_that_are_missing_or_elsewhere_change_it():
    zeros = torch.zeros(1000)
    assert fingerprint_piece(zeros, 0) != fingerprint_piece(zeros[:-1], 0)
    assert fingerprint_piece(zeros, 0) != fingerprint_piece(zeros, 1)
    assert fingerprint_piece(zeros[:0], 5) == 0


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_every_dtype_is_taken_by_its_bits_and_left_unchanged(dtype):
    values = torch.randint(0, 2, (70_000,), generator=torch.Generator().manual_seed(2)).to(dtype)
    before = values.clone()
    whole = fingerprint_piece(values, 0)
    assert values.equal(before)
    halves = (fingerprint_piece(values[:9], 0), fingerprint_piece(values[9:], 9))
    assert combine(halves) == whole
    values[0] = 1 - values[0].item()
    assert fingerprint_piece(values, 0) != whole


def test_text_and_signed_numbers_tell_the_same_fingerprint(flat):
    found = fingerprint_piece(flat, 0) | 1 << 63
    assert len(to_text(found)) == 16
    assert to_text(as_signed(found)) == to_text(found)
    assert -(1 << 63) <= as_signed(found) < 0


def test_it_is_fast_enough_to_take_after_every_load(flat):
    large = flat.repeat(40)
    fingerprint_piece(large, 0)
    seconds = []
    for _ in range(3):  # the fastest is its own; the others share the machine
        begin = time.process_time()
        fingerprint_piece(large, 0)
        seconds.append(time.process_time() - begin)
    assert large.nbytes / min(seconds) > 300e6
