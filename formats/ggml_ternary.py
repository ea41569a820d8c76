"""ggml's ternary types: blocks of 256 weights, −1, 0 or 1 times one fp16 scale.

TQ1_0   48 × five base-3 digits | 4 × four base-3 digits | fp16 d      1.6875 bits;  w = d·(q − 1), 0 ≤ q ≤ 2
TQ2_0   64 × four pairs of bits | fp16 d                               2.0625 bits;  w = d·(q − 1)

TQ1_0: digit n of bytes 0 … 31 is w[32n + l], of bytes 32 … 47 w[160 + 16n + l], of the last four w[240 + 4n + l].
Digit 0 is the most significant of five; a byte is the number v of 0 … 242 as ⌈256 v / 243⌉, so that digits fall out
by multiplying by 3 and taking the carry.
TQ2_0: of each 128 weights w[32p + l] is at bit 2p of byte l.

Layouts: ggml/src/ggml-common.h of llama.cpp b11549, block_tq1_0 and block_tq2_0.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from formats.bits import join, split
from formats.block import BlockFormat, Grid, Integers, blocked, half_bytes, half_from_bytes
from formats.scale_search import best_ternary_scale, to_half


class _Ternary(BlockFormat):
    block_size = 256
    levels = Integers(-1, 1)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        return self._grid(to_half(best_ternary_scale(weights, importance, 256)))

    def rescaled(self, scale: Tensor) -> Grid:
        return self._grid(to_half(scale))

    def _grid(self, d: Tensor) -> Grid:
        return Grid(d, self.levels, group=256, fields=(d,))


@final
class TQ1_0(_Ternary):
    """48 × five base-3 digits | 4 × four base-3 digits | fp16 d;  w = d·(q − 1)."""

    name, ggml_type, block_bytes = "TQ1_0", 34, 48 + 4 + 2

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        (d,) = grid.fields
        digits = (codes + 1).reshape(*d.shape, 256).to(torch.int32)
        parts = [
            _pack_digits(part.unflatten(2, (count, -1)))
            for part, count in zip(digits.split((160, 80, 16), dim=2), (5, 5, 4), strict=True)
        ]
        return torch.cat([*parts, half_bytes(d)], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        *parts, d = blocked(blocks, self.block_bytes).split((32, 16, 4, 2), dim=2)
        digits = [_unpack_digits(part, count) for part, count in zip(parts, (5, 5, 4), strict=True)]
        codes = torch.cat(digits, dim=2).to(torch.int8) - 1
        return codes.view(blocks.shape[0], -1), self._grid(half_from_bytes(d))


def _pack_digits(digits: Tensor) -> Tensor:
    """int32 [..., digits, lanes] → uint8 [..., lanes]."""
    value = torch.zeros_like(digits[..., 0, :])
    for n in range(5):
        value = value * 3 + (digits[..., n, :] if n < digits.shape[-2] else 0)
    return ((value * 256 + 242) // 243).to(torch.uint8)


def _unpack_digits(data: Tensor, count: int) -> Tensor:
    """uint8 [..., lanes] → int32 [..., count · lanes], the inverse of `_pack_digits`."""
    powers = 3 ** torch.arange(count, dtype=torch.int32, device=data.device)
    return ((data[..., None, :] * powers[:, None] & 255) * 3 >> 8).flatten(-2)


@final
class TQ2_0(_Ternary):
    """64 × four pairs of bits | fp16 d;  w = d·(q − 1)."""

    name, ggml_type, block_bytes = "TQ2_0", 35, 64 + 2

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        (d,) = grid.fields
        q = (codes + 1).view(torch.uint8).reshape(*d.shape, 2, 4, 32)
        return torch.cat([join(q, 2).flatten(2), half_bytes(d)], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        data, d = blocked(blocks, self.block_bytes).split((64, 2), dim=2)
        codes = split(data.unflatten(2, (2, 32)), 2).view(torch.int8) - 1
        return codes.reshape(blocks.shape[0], -1), self._grid(half_from_bytes(d))


FORMATS: tuple[BlockFormat, ...] = (TQ2_0(), TQ1_0())
