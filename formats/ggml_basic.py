"""ggml's plain types: floats, and blocks of 32 integers under one fp16 scale.

    F32, F16, BF16   the float itself, little-endian
    Q4_0    fp16 d | 16 × (low nibble: w[0:16], high nibble: w[16:32]);   w = d·(q − 8), 0 ≤ q ≤ 15
    Q8_0    fp16 d | 32 × int8 q;                                         w = d·q, −127 ≤ q ≤ 127

Codes of Q4_0 are −8 … 7: the grid is lopsided, so the *sign* of its scale matters and is searched too.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from formats.block import BlockFormat, Floats, Grid, Integers, blocked, half_bytes, half_from_bytes
from formats.scale_search import best_half_scale, grouped


class _Float(BlockFormat):
    block_size = 1
    is_float = True
    dtype: torch.dtype

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        return Grid(torch.ones(weights.shape[0], 1, device=weights.device), Floats(self.dtype), group=weights.shape[1])

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        return codes.contiguous().view(torch.uint8)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        codes = blocks.contiguous().view(self.dtype)
        return codes, self.fit(codes)


@final
class F32(_Float):
    name, ggml_type, block_bytes, dtype = "F32", 0, 4, torch.float32


@final
class F16(_Float):
    name, ggml_type, block_bytes, dtype = "F16", 1, 2, torch.float16


@final
class BF16(_Float):
    name, ggml_type, block_bytes, dtype = "BF16", 30, 2, torch.bfloat16


def _fit_blocks(weights: Tensor, importance: Tensor | None, levels: Integers, reach: tuple[float, ...]) -> Grid:
    scale = best_half_scale(*grouped(weights, importance, 32), levels, reach).view(weights.shape[0], -1)
    return Grid(scale, levels, group=32, fields=(scale,))


@final
class Q4_0(BlockFormat):
    """fp16 d | 16 × (low nibble: w[0:16], high nibble: w[16:32]);  w = d·(q − 8)."""

    name, ggml_type, block_size, block_bytes = "Q4_0", 2, 32, 2 + 16
    levels = Integers(-8, 7)
    # ggml's rule, −8, first; both signs; beyond the ends (clipping the peak) and short of them.
    reach = (-8.0, 8.0, -7.0, 7.0, -6.0, 6.0, -9.0, 9.0)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        return _fit_blocks(weights, importance, self.levels, self.reach)

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        nibbles = (codes + 8).to(torch.uint8).view(codes.shape[0], -1, 2, 16)
        data = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
        return torch.cat([half_bytes(grid.fields[0]), data], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        parts = blocked(blocks, self.block_bytes)
        data = parts[:, :, 2:]
        codes = torch.cat([data & 15, data >> 4], dim=2).to(torch.int8) - 8
        scale = half_from_bytes(parts[:, :, :2])
        return codes.view(blocks.shape[0], -1), Grid(scale, self.levels, group=32, fields=(scale,))


@final
class Q8_0(BlockFormat):
    """fp16 d | 32 × int8 q;  w = d·q."""

    name, ggml_type, block_size, block_bytes = "Q8_0", 8, 32, 2 + 32
    levels = Integers(-127, 127)
    reach = (127.0, 126.0, 125.0)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        return _fit_blocks(weights, importance, self.levels, self.reach)

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        data = codes.contiguous().view(torch.uint8).view(codes.shape[0], -1, 32)
        return torch.cat([half_bytes(grid.fields[0]), data], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        parts = blocked(blocks, self.block_bytes)
        codes = parts[:, :, 2:].contiguous().view(torch.int8)
        scale = half_from_bytes(parts[:, :, :2])
        return codes.view(blocks.shape[0], -1), Grid(scale, self.levels, group=32, fields=(scale,))


FORMATS: tuple[BlockFormat, ...] = (F32(), F16(), BF16(), Q4_0(), Q8_0())
