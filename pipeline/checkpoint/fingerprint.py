"""A tensor's fingerprint: the same for the same bits, however the tensor is cut into pieces.

The fingerprint of a tensor is Σ k(i) · (bits(i) + 2³²) mod 2⁶⁴ over its flattened elements i,
with a fixed pseudo-random odd factor k(i) for every index. A sum does not ask in which order or by
whom its terms were added, so each rank takes its own piece and the ranks add up. An odd factor is
invertible mod 2⁶⁴: one changed element always changes the sum; elements that are swapped, missing
or counted twice change it but for one chance in about 2⁶⁴. It is no defence against an attacker.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoint.pieces import Piece

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# One table of factors, small enough for a core's cache; every block of this many elements
# multiplies it by a factor of its own.
_BLOCK = 1 << 15
# Blocks at a time: bounds the temporary copy in 64 bits to 4 MiB.
_BLOCKS = 16
_MASK = (1 << 64) - 1


def fingerprint_piece(flat: Tensor, start: int) -> int:
    """This piece's part of its tensor's fingerprint.

    Args:
        flat: [n] elements of any dtype, on any device; the sum is taken there.
        start: Index of the first one in the whole flattened tensor.

    Returns:
        A number below 2⁶⁴.
    """
    bits = flat.detach().reshape(-1).contiguous().view(_BITS[flat.element_size()])
    total, done = 0, 0
    while done < len(bits):
        offset = (start + done) % _BLOCK
        whole = (len(bits) - done) // _BLOCK if offset == 0 else 0
        length = min(whole, _BLOCKS) * _BLOCK or min(_BLOCK - offset, len(bits) - done)
        total += _sum(bits[done : done + length], (start + done) // _BLOCK, offset)
        done += length
    return total & _MASK


def fingerprint_pieces(pieces: Iterable[Piece]) -> dict[str, int]:
    """One rank's part of the fingerprints of all tensors, by name."""
    return {piece.name: fingerprint_piece(piece.flat, piece.start) for piece in pieces}


def combine(parts: Iterable[int]) -> int:
    """The fingerprint of what several pieces make up together."""
    return sum(parts) & _MASK


def combine_ranks(parts: Iterable[Mapping[str, int]]) -> dict[str, str]:
    """Fingerprints of all tensors, as manifests hold them, from what each rank found."""
    totals: dict[str, int] = {}
    for own in parts:
        for name, part in own.items():
            totals[name] = combine((totals.get(name, 0), part))
    return {name: to_text(total) for name, total in sorted(totals.items())}


def as_signed(fingerprint: int) -> int:
    """A fingerprint as the signed 64-bit integer of the same bits, for tensors."""
    return fingerprint - (1 << 64) if fingerprint >> 63 else fingerprint


def to_text(fingerprint: int) -> str:
    """A fingerprint as manifests hold it: 16 hexadecimal digits."""
    return f"{fingerprint & _MASK:016x}"


def _sum(bits: Tensor, first_block: int, offset: int) -> int:
    """Part of elements that lie in one block from `offset` on, or in whole blocks."""
    table = _table(bits.device)[offset : offset + min(len(bits), _BLOCK)]
    rows = bits.view(-1, len(table)).to(torch.int64, copy=True)
    # torch's 64-bit integers wrap round, which is arithmetic mod 2⁶⁴.
    sums = rows.add_(1 << 32).mul_(table).sum(dim=1).tolist()
    return sum(part * _factor(first_block + block) for block, part in enumerate(sums))


@lru_cache
def _table(device: torch.device) -> Tensor:
    factors = [_factor(-1 - index) for index in range(_BLOCK)]
    return torch.from_numpy(np.array(factors, dtype=np.uint64).view(np.int64)).to(device)


def _factor(index: int) -> int:
    """An odd pseudo-random number: the output function of SplitMix64, lowest bit set."""
    mixed = (index * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) | 1
