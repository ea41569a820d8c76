"""ggml's K types: super-blocks of 256 weights whose sub-blocks share quantized scales, some with quantized minimums.

    Q2_K    16 × (sc, m nibbles) | 64 × pairs of bits | fp16 d | fp16 dmin        w = d·sc·q − dmin·m, 0 ≤ q ≤ 3
    Q3_K    32 × high bits | 64 × pairs of bits | 16 × 6-bit sc | fp16 d          w = d·(sc − 32)·(q − 4), 0 ≤ q ≤ 7
    Q4_K    fp16 d | fp16 dmin | 8 × 6-bit (sc, m) | 128 × nibbles                w = d·sc·q − dmin·m, 0 ≤ q ≤ 15
    Q5_K    fp16 d | fp16 dmin | 8 × 6-bit (sc, m) | 32 × high bits | 128 × nibbles      … 0 ≤ q ≤ 31
    Q6_K    128 × low nibbles | 64 × high pairs of bits | 16 × int8 sc | fp16 d   w = d·sc·(q − 32), 0 ≤ q ≤ 63

Sub-blocks are 16 weights in Q2_K, Q3_K and Q6_K, 32 in Q4_K and Q5_K. Where the bits are:

    pairs of bits (Q2_K, Q3_K; of each 128 weights), l in 0 … 31, p in 0 … 3:   w[32p + l] at bit 2p of byte l
    high bits (Q3_K, Q5_K), l in 0 … 31, p in 0 … 7:                            w[32p + l] at bit p of byte l
    nibbles (Q4_K, Q5_K; of each 64 weights), l in 0 … 31:                      w[l] low, w[32 + l] high in byte l
    Q6_K, of each 128 weights, l in 0 … 31 (ql: 64 bytes, qh: 32 bytes):
        w[l]      = ql[l] & 15      | (qh[l] >> 0 & 3) << 4
        w[l + 32] = ql[l + 32] & 15 | (qh[l] >> 2 & 3) << 4
        w[l + 64] = ql[l] >> 4      | (qh[l] >> 4 & 3) << 4
        w[l + 96] = ql[l + 32] >> 4 | (qh[l] >> 6 & 3) << 4

    12 bytes b of 8 6-bit sc and m (Q4_K, Q5_K), j in 0 … 3:
        sc[j] = b[j] & 63       sc[4 + j] = b[8 + j] & 15 | b[j] >> 6 << 4
        m[j] = b[4 + j] & 63    m[4 + j]  = b[8 + j] >> 4 | b[4 + j] >> 6 << 4
    12 bytes b of 16 6-bit sc (Q3_K), j in 0 … 7, k in 0 … 3:
        low nibbles: sc[j] = b[j] & 15, sc[8 + j] = b[j] >> 4;    high pairs: sc[4p + k] at bit 2p of b[8 + k]

llama.cpp stores the output matrix of Q4_0 and most other files as Q6_K where 256 divides its rows.

Layouts: ggml/src/ggml-common.h of llama.cpp b11549, block_q2_K … block_q6_K.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor

from formats.bits import join, pack_nibbles, split, unpack_nibbles
from formats.block import BlockFormat, Grid, Integers, blocked, half_bytes, half_from_bytes
from formats.scale_search import grouped
from formats.super_blocks import fit_scales, fit_scales_and_mins, refit_scale, refit_scale_and_min, replaced


class _Scales(BlockFormat):
    """w = d · sc · level, with 16 signed sub-scales."""

    block_size = 256
    levels: ClassVar[Integers]
    reach: ClassVar[tuple[float, ...]]
    sub_levels: ClassVar[Integers]
    ends: ClassVar[tuple[float, ...]]  # where the largest sub-scale may land

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        groups = grouped(weights, importance, 16)
        d, sc = fit_scales(*groups, self.levels, self.reach, (0.5, 0.25), 16, self.sub_levels, self.ends)
        return self._grid(d.view(weights.shape[0], -1), sc.view(weights.shape[0], -1))

    def refit(self, grid: Grid, group: int, weights: Tensor, importance: Tensor | None = None) -> Grid:
        d, sc = grid.fields
        x, imp = grouped(weights, importance, 16)
        fresh = refit_scale(x, imp, self.levels, self.reach, (0.5, 0.25), self.sub_levels, d[:, 0], sc[:, group])
        return self._grid(d, replaced(sc, group, fresh))

    def _grid(self, d: Tensor, sc: Tensor) -> Grid:
        return Grid(d.repeat_interleave(16, dim=1) * sc, self.levels, group=16, fields=(d, sc))


@final
class Q3_K(_Scales):
    """32 × high bits | 64 × pairs of bits | 16 × 6-bit sc | fp16 d;  w = d·(sc − 32)·(q − 4)."""

    name, ggml_type, block_bytes = "Q3_K", 11, 32 + 64 + 12 + 2
    levels, sub_levels = Integers(-4, 3), Integers(-32, 31)
    reach = (-4.0, 4.0, -3.0, 3.0, -3.5, 3.5, -5.0, 5.0, -2.0, 2.0)
    ends = (-32.0, 31.0, -31.0, 30.0, -30.0, -29.0)

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        d, sc = grid.fields
        q = (codes + 4).view(torch.uint8).reshape(*d.shape, 256)
        scales = (sc + 32).to(torch.uint8).view(*d.shape, 16)
        parts = (
            _pack_high_bits(q >> 2),
            _pack_pairs(q & 3),
            pack_nibbles(scales & 15, 16),
            join((scales >> 4).unflatten(2, (4, 4)), 2),
            half_bytes(d),
        )
        return torch.cat(parts, dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        high, pairs, low_sc, high_sc, d = blocked(blocks, self.block_bytes).split((32, 64, 8, 4, 2), dim=2)
        codes = (_unpack_pairs(pairs) | _unpack_high_bits(high) << 2).view(torch.int8) - 4
        sc = unpack_nibbles(low_sc, 16) | split(high_sc, 2).flatten(-2) << 4
        scales = (sc.to(torch.float32) - 32).view(blocks.shape[0], -1)
        return codes.view(blocks.shape[0], -1), self._grid(half_from_bytes(d), scales)


@final
class Q6_K(_Scales):
    """128 × low nibbles | 64 × high pairs of bits | 16 × int8 sc | fp16 d;  w = d·sc·(q − 32)."""

    name, ggml_type, block_bytes = "Q6_K", 14, 128 + 64 + 16 + 2
    levels, sub_levels = Integers(-32, 31), Integers(-128, 127)
    reach = (-32.0, 32.0, -31.0, 31.0, -30.0, 30.0)
    ends = (-128.0, 127.0, -127.0, -126.0, -124.0, -122.0, -120.0)

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        d, sc = grid.fields
        q = (codes + 32).view(torch.uint8).reshape(*d.shape, 256)
        scales = sc.to(torch.int8).view(torch.uint8).view(*d.shape, 16)
        parts = pack_nibbles(q & 15, 128), _pack_pairs(q >> 4), scales, half_bytes(d)
        return torch.cat(parts, dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        low, high, sc, d = blocked(blocks, self.block_bytes).split((128, 64, 16, 2), dim=2)
        codes = (unpack_nibbles(low, 128) | _unpack_pairs(high) << 4).view(torch.int8) - 32
        scales = sc.contiguous().view(torch.int8).to(torch.float32).view(blocks.shape[0], -1)
        return codes.view(blocks.shape[0], -1), self._grid(half_from_bytes(d), scales)


class _ScalesAndMins(BlockFormat):
    """w = d · sc · q − dmin · m, with unsigned sub-scales and sub-minimums."""

    block_size = 256
    sub_block: ClassVar[int]
    levels: ClassVar[Integers]
    sub_levels: ClassVar[Integers]

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        groups = grouped(weights, importance, self.sub_block)
        fields = fit_scales_and_mins(*groups, self.levels, self.block_size // self.sub_block, self.sub_levels)
        return self._grid(*(field.view(weights.shape[0], -1) for field in fields))

    def refit(self, grid: Grid, group: int, weights: Tensor, importance: Tensor | None = None) -> Grid:
        d, dmin, sc, m = grid.fields
        x, imp = grouped(weights, importance, self.sub_block)
        old = d[:, 0], dmin[:, 0], sc[:, group], m[:, group]
        fresh_sc, fresh_m = refit_scale_and_min(x, imp, self.levels.high, self.sub_levels.high, *old)
        return self._grid(d, dmin, replaced(sc, group, fresh_sc), replaced(m, group, fresh_m))

    def _grid(self, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> Grid:
        subs = self.block_size // self.sub_block
        scale = d.repeat_interleave(subs, dim=1) * sc
        offset = -(dmin.repeat_interleave(subs, dim=1) * m)
        return Grid(scale, self.levels, group=self.sub_block, offset=offset, fields=(d, dmin, sc, m))


@final
class Q2_K(_ScalesAndMins):
    """16 × (sc, m nibbles) | 64 × pairs of bits | fp16 d | fp16 dmin;  w = d·sc·q − dmin·m."""

    name, ggml_type, block_bytes, sub_block = "Q2_K", 10, 16 + 64 + 2 + 2, 16
    levels, sub_levels = Integers(0, 3), Integers(0, 15)

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        d, dmin, sc, m = grid.fields
        q = codes.reshape(*d.shape, 256)
        scales = sc.to(torch.uint8).view(*d.shape, 16) | m.to(torch.uint8).view(*d.shape, 16) << 4
        return torch.cat([scales, _pack_pairs(q), half_bytes(d), half_bytes(dmin)], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        rows = blocks.shape[0]
        scales, pairs, d, dmin = blocked(blocks, self.block_bytes).split((16, 64, 2, 2), dim=2)
        sc, m = ((part.to(torch.float32)).reshape(rows, -1) for part in (scales & 15, scales >> 4))
        codes = _unpack_pairs(pairs)
        return codes.view(rows, -1), self._grid(half_from_bytes(d), half_from_bytes(dmin), sc, m)


class _SixBitScales(_ScalesAndMins):
    """fp16 d | fp16 dmin | 8 × 6-bit (sc, m) | codes."""

    sub_block = 32
    sub_levels = Integers(0, 63)

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        d, dmin, sc, m = grid.fields
        q = codes.reshape(*d.shape, 256)
        scales = _pack_six_bits(*(part.to(torch.uint8).view(*d.shape, 8) for part in (sc, m)))
        return torch.cat([half_bytes(d), half_bytes(dmin), scales, self.pack_codes(q)], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        rows = blocks.shape[0]
        d, dmin, scales, data = blocked(blocks, self.block_bytes).split((2, 2, 12, self.block_bytes - 16), dim=2)
        sc, m = (part.to(torch.float32).view(rows, -1) for part in _unpack_six_bits(scales))
        codes = self.unpack_codes(data)
        return codes.view(rows, -1), self._grid(half_from_bytes(d), half_from_bytes(dmin), sc, m)

    @abstractmethod
    def pack_codes(self, codes: Tensor) -> Tensor:
        """uint8 [rows, blocks, 256] → uint8 [rows, blocks, block_bytes − 16]."""

    @abstractmethod
    def unpack_codes(self, data: Tensor) -> Tensor:
        """The inverse of `pack_codes`."""


@final
class Q4_K(_SixBitScales):
    """fp16 d | fp16 dmin | 8 × 6-bit (sc, m) | 128 × nibbles;  w = d·sc·q − dmin·m."""

    name, ggml_type, block_bytes = "Q4_K", 12, 2 + 2 + 12 + 128
    levels = Integers(0, 15)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes, 64)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_nibbles(data, 64)


@final
class Q5_K(_SixBitScales):
    """fp16 d | fp16 dmin | 8 × 6-bit (sc, m) | 32 × high bits | 128 × nibbles;  w = d·sc·q − dmin·m."""

    name, ggml_type, block_bytes = "Q5_K", 13, 2 + 2 + 12 + 32 + 128
    levels = Integers(0, 31)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return torch.cat([_pack_high_bits(codes >> 4), pack_nibbles(codes & 15, 64)], dim=2)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_nibbles(data[:, :, 32:], 64) | _unpack_high_bits(data[:, :, :32]) << 4


def _pack_pairs(codes: Tensor) -> Tensor:
    return join(codes.unflatten(2, (2, 4, 32)), 2).flatten(2)


def _unpack_pairs(data: Tensor) -> Tensor:
    return split(data.unflatten(2, (2, 32)), 2).flatten(2)


def _pack_high_bits(codes: Tensor) -> Tensor:
    return join(codes.unflatten(2, (8, 32)), 1)


def _unpack_high_bits(data: Tensor) -> Tensor:
    return split(data, 1).flatten(2)


def _pack_six_bits(sc: Tensor, m: Tensor) -> Tensor:
    (first_sc, last_sc), (first_m, last_m) = sc.split(4, dim=2), m.split(4, dim=2)
    parts = first_sc | last_sc >> 4 << 6, first_m | last_m >> 4 << 6, last_sc & 15 | (last_m & 15) << 4
    return torch.cat(parts, dim=2)


def _unpack_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c = data.split(4, dim=2)
    return torch.cat([a & 63, c & 15 | a >> 6 << 4], dim=2), torch.cat([b & 63, c >> 4 | b >> 6 << 4], dim=2)


FORMATS: tuple[BlockFormat, ...] = (Q6_K(), Q5_K(), Q4_K(), Q3_K(), Q2_K())
