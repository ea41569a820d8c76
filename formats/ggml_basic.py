"""ggml's plain types: floats, and blocks of integers under one fp16 scale d, some with an fp16 minimum m.

    F32, F16, BF16   the float itself, little-endian
    Q1_0    fp16 d | 16 × eight consecutive bits                          blocks of 128;  w = d·(2q − 1)
    Q2_0    fp16 d | 16 × four consecutive pairs of bits                  blocks of 64;   w = d·(q − 1), 0 ≤ q ≤ 3
    Q4_0    fp16 d | 16 × (low nibble: w[0:16], high nibble: w[16:32])    blocks of 32;   w = d·(q − 8), 0 ≤ q ≤ 15
    Q4_1    fp16 d | fp16 m | nibbles as in Q4_0                                          w = d·q + m
    Q5_0    fp16 d | 4 × eight consecutive high bits | low nibbles as in Q4_0             w = d·(q − 16), 0 ≤ q ≤ 31
    Q5_1    fp16 d | fp16 m | high bits | low nibbles                                     w = d·q + m
    Q8_0    fp16 d | 32 × int8 q                                                          w = d·q, −127 ≤ q ≤ 127

Codes of Q4_0 are −8 … 7: the grid is lopsided, so the *sign* of its scale matters and is searched too.

Layouts: ggml/src/ggml-common.h of llama.cpp b11549, block_q4_0 and its neighbours.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor

from formats.affine_search import best_half_affine
from formats.bits import pack_consecutive, pack_nibbles, unpack_consecutive, unpack_nibbles
from formats.block import BlockFormat, Codebook, Floats, Grid, Integers, blocked, half_bytes, half_from_bytes
from formats.scale_search import best_half_scale, grouped, to_half


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


class OneScale(BlockFormat):
    """fp16 d | codes;  w = d · level. A subclass lays out the codes and says where a scale search looks."""

    levels: Integers | Codebook
    reach: tuple[float, ...]  # where the largest weight of a block is put, ggml's rule first
    beside: tuple[float, ...] = (0.5, 0.25)  # how far around the best of them

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        return self._grid(best_half_scale(weights, importance, self.block_size, self.levels, self.reach, self.beside))

    def rescaled(self, scale: Tensor) -> Grid:
        return self._grid(to_half(scale))

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        data = self.pack_codes(codes.contiguous().view(codes.shape[0], -1, self.block_size))
        return torch.cat([half_bytes(grid.fields[0]), data], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        parts = blocked(blocks, self.block_bytes)
        codes = self.unpack_codes(parts[:, :, 2:].contiguous())
        return codes.view(blocks.shape[0], -1), self._grid(half_from_bytes(parts[:, :, :2]))

    def _grid(self, d: Tensor) -> Grid:
        return Grid(d, self.levels, group=self.block_size, fields=(d,))

    @abstractmethod
    def pack_codes(self, codes: Tensor) -> Tensor:
        """[rows, blocks, block_size] → uint8 [rows, blocks, block_bytes − 2]."""

    @abstractmethod
    def unpack_codes(self, data: Tensor) -> Tensor:
        """The inverse of `pack_codes`."""


@final
class Q1_0(OneScale):
    """fp16 d | 16 × eight consecutive bits;  w = d·(2q − 1)."""

    name, ggml_type, block_size, block_bytes = "Q1_0", 41, 128, 2 + 16
    levels = Codebook((-1.0, 1.0))
    reach, beside = (1.0,), ()

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_consecutive(codes, 1)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_consecutive(data, 1)


@final
class Q2_0(OneScale):
    """fp16 d | 16 × four consecutive pairs of bits;  w = d·(q − 1)."""

    name, ggml_type, block_size, block_bytes = "Q2_0", 42, 64, 2 + 16
    levels = Integers(-1, 2)
    reach = (1.0, -1.0, 1.5, -1.5, 2.0, -2.0, 2.5, -2.5, 3.0, -3.0, 4.0, -4.0, 6.0, -6.0)
    beside = (0.25, 0.125)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_consecutive((codes + 1).view(torch.uint8), 2)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_consecutive(data, 2).view(torch.int8) - 1


@final
class Q4_0(OneScale):
    """fp16 d | 16 × (low nibble: w[0:16], high nibble: w[16:32]);  w = d·(q − 8)."""

    name, ggml_type, block_size, block_bytes = "Q4_0", 2, 32, 2 + 16
    levels = Integers(-8, 7)
    # ggml's rule, −8, first; both signs; beyond the ends (clipping the peak) and short of them.
    reach = (-8.0, 8.0, -7.0, 7.0, -6.0, 6.0, -9.0, 9.0)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_nibbles((codes + 8).view(torch.uint8), 32)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_nibbles(data, 32).view(torch.int8) - 8


@final
class Q5_0(OneScale):
    """fp16 d | 4 × eight consecutive high bits | 16 × low nibbles;  w = d·(q − 16)."""

    name, ggml_type, block_size, block_bytes = "Q5_0", 6, 32, 2 + 4 + 16
    levels = Integers(-16, 15)
    reach = (-16.0, 16.0, -15.0, 15.0, -14.0, 14.0, -17.0, 17.0)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return _pack_five_bits((codes + 16).view(torch.uint8))

    def unpack_codes(self, data: Tensor) -> Tensor:
        return _unpack_five_bits(data).view(torch.int8) - 16


@final
class Q8_0(OneScale):
    """fp16 d | 32 × int8 q;  w = d·q."""

    name, ggml_type, block_size, block_bytes = "Q8_0", 8, 32, 2 + 32
    levels = Integers(-127, 127)
    reach = (127.0, 126.0, 125.0)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.uint8)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return data.view(torch.int8)


class _ScaleAndMin(BlockFormat):
    """fp16 d | fp16 m | codes;  w = d·q + m."""

    block_size = 32
    levels: ClassVar[Integers]

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        d, m = best_half_affine(*grouped(weights, importance, self.block_size), self.levels.high)
        return self._grid(d.view(weights.shape[0], -1), m.view(weights.shape[0], -1))

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        data = self.pack_codes(codes.reshape(codes.shape[0], -1, self.block_size))
        return torch.cat([*map(half_bytes, grid.fields), data], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        parts = blocked(blocks, self.block_bytes)
        codes = self.unpack_codes(parts[:, :, 4:].contiguous())
        return codes.view(blocks.shape[0], -1), self._grid(
            half_from_bytes(parts[:, :, :2]), half_from_bytes(parts[:, :, 2:4])
        )

    def _grid(self, d: Tensor, m: Tensor) -> Grid:
        return Grid(d, self.levels, group=self.block_size, offset=m, fields=(d, m))

    @abstractmethod
    def pack_codes(self, codes: Tensor) -> Tensor:
        """uint8 [rows, blocks, block_size] → uint8 [rows, blocks, block_bytes − 4]."""

    @abstractmethod
    def unpack_codes(self, data: Tensor) -> Tensor:
        """The inverse of `pack_codes`."""


@final
class Q4_1(_ScaleAndMin):
    """fp16 d | fp16 m | 16 × nibbles as in Q4_0;  w = d·q + m."""

    name, ggml_type, block_bytes = "Q4_1", 3, 2 + 2 + 16
    levels = Integers(0, 15)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes, 32)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_nibbles(data, 32)


@final
class Q5_1(_ScaleAndMin):
    """fp16 d | fp16 m | 4 × eight consecutive high bits | 16 × low nibbles;  w = d·q + m."""

    name, ggml_type, block_bytes = "Q5_1", 7, 2 + 2 + 4 + 16
    levels = Integers(0, 31)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return _pack_five_bits(codes)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return _unpack_five_bits(data)


def _pack_five_bits(codes: Tensor) -> Tensor:
    return torch.cat([pack_consecutive(codes >> 4, 1), pack_nibbles(codes & 15, 32)], dim=-1)


def _unpack_five_bits(data: Tensor) -> Tensor:
    return unpack_nibbles(data[..., 4:].contiguous(), 32) | unpack_consecutive(data[..., :4], 1) << 4


FORMATS: tuple[BlockFormat, ...] = (
    F32(), F16(), BF16(), Q8_0(), Q5_1(), Q5_0(), Q4_1(), Q4_0(), Q2_0(), Q1_0(),
)  # fmt: skip
