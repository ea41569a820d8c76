"""ggml's codebook types: 4-bit places in a list of 16 uneven levels, denser around zero.

IQ4_NL  fp16 d | 16 × nibbles as in Q4_0                                               blocks of 32;   w = d·level[q]
IQ4_XS  fp16 d | u16 high pairs of sc | 4 × low nibbles of sc | 128 × nibbles
                                                                           blocks of 256;  w = d·(sc − 32)·level[q]

IQ4_XS, sub-blocks of 32: nibbles as in Q4_0 for each; sc[j] = low nibble j (lowest first) | high pair j << 4

Layouts: ggml/src/ggml-common.h of llama.cpp b11549, block_iq4_nl, block_iq4_xs and kvalues_iq4nl.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from formats.bits import pack_consecutive, pack_nibbles, unpack_consecutive, unpack_nibbles
from formats.block import BlockFormat, Codebook, Grid, Integers, blocked, half_bytes, half_from_bytes
from formats.ggml_basic import OneScale
from formats.scale_search import grouped
from formats.super_blocks import fit_scales, refit_scale, replaced

_LEVELS = Codebook((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_REACH = (-127.0, 127.0, -113.0, 113.0, -98.0, 98.0, -142.0, 142.0)
_BESIDE = (7.0, 3.5)


@final
class IQ4_NL(OneScale):
    """fp16 d | 16 × (low nibble: w[0:16], high nibble: w[16:32]);  w = d·level[q]."""

    name, ggml_type, block_size, block_bytes = "IQ4_NL", 20, 32, 2 + 16
    levels, reach, beside = _LEVELS, _REACH, _BESIDE

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes, 32)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_nibbles(data, 32)


@final
class IQ4_XS(BlockFormat):
    """fp16 d | u16 high pairs of sc | 4 × low nibbles of sc | 128 × nibbles;  w = d·(sc − 32)·level[q]."""

    name, ggml_type, block_size, block_bytes = "IQ4_XS", 23, 256, 2 + 2 + 4 + 128

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        groups = grouped(weights, importance, 32)
        ends = (-32.0, 31.0, -31.0, 30.0, -30.0, -29.0)
        d, sc = fit_scales(*groups, _LEVELS, _REACH, _BESIDE, 8, Integers(-32, 31), ends)
        return self._grid(d.view(weights.shape[0], -1), sc.view(weights.shape[0], -1))

    def refit(self, grid: Grid, group: int, weights: Tensor, importance: Tensor | None = None) -> Grid:
        d, sc = grid.fields
        x, imp = grouped(weights, importance, 32)
        fresh = refit_scale(x, imp, _LEVELS, _REACH, _BESIDE, Integers(-32, 31), d[:, 0], sc[:, group])
        return self._grid(d, replaced(sc, group, fresh))

    def _grid(self, d: Tensor, sc: Tensor) -> Grid:
        return Grid(d.repeat_interleave(8, dim=1) * sc, _LEVELS, group=32, fields=(d, sc))

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        d, sc = grid.fields
        scales = (sc + 32).to(torch.uint8).view(*d.shape, 8)
        data = pack_nibbles(codes.reshape(*d.shape, 256), 32)
        parts = half_bytes(d), pack_consecutive(scales >> 4, 2), pack_consecutive(scales & 15, 4), data
        return torch.cat(parts, dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        d, high, low, data = blocked(blocks, self.block_bytes).split((2, 2, 4, 128), dim=2)
        sc = unpack_consecutive(low, 4) | unpack_consecutive(high, 2) << 4
        scales = (sc.to(torch.float32) - 32).view(blocks.shape[0], -1)
        return unpack_nibbles(data, 32).view(blocks.shape[0], -1), self._grid(half_from_bytes(d), scales)


FORMATS: tuple[BlockFormat, ...] = (IQ4_NL(), IQ4_XS())
