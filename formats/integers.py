"""Plain integers of 2, 3, 4 or 8 bits under an fp16 scale, in groups or whole rows, symmetric or with a zero point.

    fp16 s | codes as a little-endian stream                  w = s·q,        −2^(bits−1) ≤ q < 2^(bits−1)
    fp16 s | u8 z | codes as a little-endian stream           w = s·(q − z),  0 ≤ q, z < 2^bits

    fp16 s | codes of 2 bits as a little-endian stream        w = s·(q − 1),  0 ≤ q ≤ 2 (ternary)
    fp16 s | codes as a little-endian stream                  w = s·level[q], integers and ±½ (dINT)

What ONNX calls blocked DequantizeLinear and MatMulNBits. GGUF has no such types.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from formats.affine_search import Weighed, search_affine
from formats.bits import pack_stream, unpack_stream
from formats.block import (
    BlockFormat,
    Codebook,
    FormatError,
    Grid,
    Integers,
    blocked,
    half_bytes,
    half_from_bytes,
    reciprocal,
)
from formats.ggml_basic import OneScale
from formats.scale_search import best_half_scale, best_ternary_scale, grouped, in_chunks, search_scale, to_half
from formats.sums import weighted_error


@final
class IntegerGrid(BlockFormat):
    """fp16 s | u8 z unless symmetric | codes;  w = s·q or s·(q − z).

    group: weights under one scale; the length of a row for one scale per output channel.
    s has the sign that suits the group: the level −2^(bits − 1) has no counterpart.
    """

    ggml_type = None

    def __init__(self, bits: int, group: int, *, symmetric: bool = True) -> None:
        """Raises FormatError for bits other than 2, 3, 4, 8 and for groups that do not fill whole bytes."""
        if bits not in (2, 3, 4, 8) or group < 1 or group * bits % 8:
            raise FormatError(f"no integer grid of {bits} bits in groups of {group}; 2, 3, 4 or 8 bits in whole bytes")
        self.bits, self.symmetric = bits, symmetric
        self.name = f"{'INT' if symmetric else 'UINT'}{bits}_G{group}"
        self.block_size = group
        self.block_bytes = 2 + (not symmetric) + group * bits // 8
        half = 2 ** (bits - 1)
        self.levels = Integers(-half, half - 1) if symmetric else Integers(0, 2 * half - 1)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        if self.symmetric:
            reach = _reach(2.0 ** (self.bits - 1))
            return self._grid(best_half_scale(weights, importance, self.block_size, self.levels, reach))
        rows = weights.shape[0]
        s, z = in_chunks(self._search, *grouped(weights, importance, self.block_size))
        return self._grid(s.view(rows, -1), z.view(rows, -1))

    def rescaled(self, scale: Tensor) -> Grid | None:
        return self._grid(to_half(scale)) if self.symmetric else None

    def _search(self, x: Tensor, imp: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each group; never worse than the range of the weights laid on the codes, nor than a
        symmetric grid of either sign."""
        high = self.levels.high
        low, top = x.amin(0), x.amax(0)
        low, top = low.clamp(max=0.0), top.clamp(min=0.0)
        found, offset = search_affine(x, imp, high, below_zero=True)
        middle = 2 ** (self.bits - 1)
        even = search_scale(x, imp, Integers(-middle, middle - 1), _reach(2.0 ** (self.bits - 1)), (0.5, 0.25))
        best_s = best_z = error = torch.full_like(low, torch.inf)
        weighed = Weighed.of(x, imp)
        for s, lowest in (((top - low) / high, low), (found, offset), (even, -middle * even)):
            s = to_half(s)
            for _ in range(2):
                z = (-lowest * reciprocal(s)).round_().clamp_(0, high)
                errors = weighted_error(x, imp, s, self.levels, -z * s)
                better = errors < error
                best_s, best_z = torch.where(better, s, best_s), torch.where(better, z, best_z)
                error = torch.where(better, errors, error)
                fresh = weighed.moments(s, -z * s, high).scale(z)
                s = to_half(torch.where(torch.isfinite(fresh), fresh, s))
                lowest = -z * s
        found = torch.isfinite(best_s)
        return torch.where(found, best_s, 0.0), torch.where(found, best_z, 0.0)

    def _grid(self, s: Tensor, z: Tensor | None = None) -> Grid:
        # s·q and s·z are exact in float32, so their difference is s·(q − z).
        if z is None:
            return Grid(s, self.levels, group=self.block_size, fields=(s,))
        return Grid(s, self.levels, group=self.block_size, offset=-(s * z), fields=(s, z))

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        rows = codes.shape[0]
        unsigned = (codes - self.levels.low).contiguous().view(torch.uint8).view(rows, -1, self.block_size)
        parts = [half_bytes(grid.fields[0]), *(z.to(torch.uint8)[:, :, None] for z in grid.fields[1:])]
        return torch.cat([*parts, pack_stream(unsigned, self.bits)], dim=2).view(rows, -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        rows, parts = blocks.shape[0], blocked(blocks, self.block_bytes)
        begin = 2 + (not self.symmetric)
        unsigned = unpack_stream(parts[:, :, begin:].contiguous(), self.bits)
        z = None if self.symmetric else parts[:, :, 2].to(torch.float32)
        codes = unsigned.view(torch.int8) + self.levels.low if self.symmetric else unsigned
        return codes.view(rows, -1), self._grid(half_from_bytes(parts[:, :, :2]), z)


@final
class TernaryGrid(OneScale):
    """fp16 s | codes of 2 bits;  w = s·(q − 1), 0 ≤ q ≤ 2, in groups of any multiple of 4 weights, or whole rows."""

    ggml_type = None
    levels = Integers(-1, 1)

    def __init__(self, group: int) -> None:
        """Raises FormatError for groups that do not fill whole bytes."""
        if group < 1 or group % 4:
            raise FormatError(f"no ternary grid in groups of {group}; 2-bit codes in whole bytes")
        self.name = f"TERNARY_G{group}"
        self.block_size = group
        self.block_bytes = 2 + group // 4

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        return self.rescaled(best_ternary_scale(weights, importance, self.block_size))

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_stream((codes + 1).view(torch.uint8), 2)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_stream(data, 2).view(torch.int8) - 1


@final
class DenormalGrid(OneScale):
    """fp16 s | codes;  w = s·level, integers and ±½, in groups or whole rows: dINT (arXiv 2311.05161), where small
    weights are not lost to 0. Of 2^bits levels two are ±½, the others −2^(bits−1) + 1 … 2^(bits−1) − 2."""

    ggml_type = None

    def __init__(self, bits: int, group: int) -> None:
        """Raises FormatError for bits other than 3, 4, 8 and for groups that do not fill whole bytes."""
        if bits not in (3, 4, 8) or group < 1 or group * bits % 8:
            raise FormatError(f"no dINT grid of {bits} bits in groups of {group}; 3, 4 or 8 bits in whole bytes")
        self.bits = bits
        self.name = f"DINT{bits}_G{group}"
        self.block_size = group
        self.block_bytes = 2 + group * bits // 8
        half = 2 ** (bits - 1)
        self.levels = Codebook((*map(float, range(1 - half, 0)), -0.5, 0.0, 0.5, *map(float, range(1, half - 1))))
        self.reach = _reach(half - 1.0)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_stream(codes, self.bits)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_stream(data, self.bits)


def _reach(end: float) -> tuple[float, ...]:
    """Where a symmetric search puts the largest weight: at either `end` of the codes, short of it, beyond."""
    return (-end, end, 1 - end, end - 1, -0.75 * end, 0.75 * end, -1.25 * end, 1.25 * end)
