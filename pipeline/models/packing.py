"""Sequences of different lengths one after the other, without padding: what a packed pass runs on.

A pass over several masks of a micro-batch holds one sequence per mask and clip, mask after mask,
clip after clip. Linear layers, norms and MLPs see only a long list of tokens [P, D]; attention is
told by a `Packing` where a sequence ends. Nothing here waits for the device: lengths are known to
the host, and index tensors are derived from them on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from pipeline.clip import MaskSet

Lengths = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Where the sequences of a packed tensor [P, …] lie."""

    lengths: Lengths
    """Tokens of each sequence, known to the host."""
    offsets: Tensor
    """int32 [sequences + 1] on the device: sequence s is tokens offsets[s] to offsets[s + 1]."""
    longest: int
    """The greatest of `lengths`."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    def runs(self) -> tuple[tuple[int, int], ...]:
        """Consecutive sequences of one length as (how many, length), for kernels without packing.

        With masks cut to one length per batch, that is one run per mask.
        """
        return tuple((len(tuple(same)), length) for length, same in groupby(self.lengths))


def packing_of(lengths: Sequence[int], device: torch.device) -> Packing:
    """The packing of sequences of these lengths; the offsets of recent ones are kept."""
    found = tuple(lengths)
    return Packing(lengths=found, offsets=_offsets(found, device), longest=max(found, default=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTokens:
    """Which tokens of which clips stand one after the other: mask after mask, clip after clip."""

    index_P: Tensor
    """Index of each token in its clip's grid."""
    clip_P: Tensor
    """Which clip of the micro-batch each token is of."""
    packing: Packing
    per_mask: Lengths
    """Tokens of each mask, all clips together: what `torch.split` takes a result apart with."""


def context_tokens(masks: Sequence[MaskSet]) -> PackedTokens:
    """The context tokens of all masks of a micro-batch, packed."""
    return _packed(
        [mask.context_BK for mask in masks],
        [context_lengths(mask) for mask in masks],
    )


def target_tokens(masks: Sequence[MaskSet]) -> PackedTokens:
    """The target tokens of all masks of a micro-batch, packed."""
    return _packed(
        [mask.target_BK for mask in masks],
        [target_lengths(mask) for mask in masks],
    )


def gather_packed(x_BND: Tensor, tokens: PackedTokens) -> Tensor:
    """The tokens [P, D] that `tokens` names, of features [B, N, D] of all tokens."""
    rows_P = tokens.clip_P * x_BND.shape[1] + tokens.index_P
    return x_BND.flatten(0, 1).index_select(0, rows_P)


def context_lengths(mask: MaskSet) -> Lengths:
    """Context tokens that a mask keeps of each clip."""
    return _row_lengths(mask.context_BK, mask.context_lengths)


def target_lengths(mask: MaskSet) -> Lengths:
    """Target tokens that a mask keeps of each clip."""
    return _row_lengths(mask.target_BK, mask.target_lengths)


def _row_lengths(index_BK: Tensor, lengths: Lengths | None) -> Lengths:
    return (index_BK.shape[1],) * index_BK.shape[0] if lengths is None else lengths


def _packed(indices: Sequence[Tensor], lengths: Sequence[Lengths]) -> PackedTokens:
    device = indices[0].device
    packing = packing_of([length for rows in lengths for length in rows], device)
    parts = [_without_padding(*pair) for pair in zip(indices, lengths, strict=True)]
    num_clips = indices[0].shape[0]
    return PackedTokens(
        index_P=torch.cat(parts) if len(parts) > 1 else parts[0],
        clip_P=sequence_of_token(packing).remainder(num_clips),
        packing=packing,
        per_mask=tuple(sum(rows) for rows in lengths),
    )


def sequence_of_token(packing: Packing) -> Tensor:
    """Number of the sequence that each token belongs to, int64 [P]."""
    number_S = torch.arange(len(packing.lengths), device=packing.offsets.device)
    # The size of the result is given, so that the device need not be asked for it.
    return number_S.repeat_interleave(packing.offsets.diff(), output_size=packing.num_tokens)


def _without_padding(index_BK: Tensor, lengths: Lengths) -> Tensor:
    if all(length == index_BK.shape[1] for length in lengths):
        return index_BK.flatten()
    packing = packing_of(lengths, index_BK.device)
    row_P = sequence_of_token(packing)
    within_P = torch.arange(packing.num_tokens, device=row_P.device) - packing.offsets[row_P]
    return index_BK[row_P, within_P]


@lru_cache(maxsize=64)
def _offsets(lengths: Lengths, device: torch.device) -> Tensor:
    # A tensor made in inference mode could never be kept for a backward pass.
    with torch.inference_mode(mode=False):
        on_gpu = device.type == "cuda"
        ends = tuple(accumulate(lengths, initial=0))
        host = torch.tensor(ends, dtype=torch.int32, pin_memory=on_gpu, device="cpu")
        return host.to(device, non_blocking=on_gpu)
