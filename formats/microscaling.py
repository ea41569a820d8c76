"""Block floats: few-bit elements under a scale of one byte, OCP's Microscaling types and NVIDIA's.

    MXFP4   E8M0 e | 16 × (low nibble: w[0:16], high nibble: w[16:32]), E2M1             w = 2^(e−127)·E2M1
    NVFP4   4 × UE4M3 s, one for 16 weights | 4 × 8 × (low: w[0:8], high: w[8:16]), E2M1  w = s·E2M1
            and one float32 for the whole tensor beside it, where its weights are too small or too large for UE4M3
    MXFP8_E4M3, MXFP8_E5M2   E8M0 e | 32 × the float                                     w = 2^(e−127)·float
    MXFP6_E2M3, MXFP6_E3M2   E8M0 e | 32 × 6 bits, a little-endian stream                w = 2^(e−127)·float
    MXINT8  E8M0 e | 32 × int8 q                                                         w = 2^(e−127)·q/64

Source: OCP Microscaling Formats (MX) Specification 1.0; its scale rule is 2^(⌊log2 max|w|⌋ − emax) with emax the
exponent of the largest element, and its neighbours are tried too. GGUF stores MXFP4 and NVFP4; of the rest the
specification fixes elements and scale, not where the bytes are: scale first, as in ggml.
"""

from __future__ import annotations

import math
from functools import cache
from typing import final

import torch
from torch import Tensor

from formats import native
from formats.bits import pack_nibbles, pack_stream, unpack_nibbles, unpack_stream
from formats.block import BlockFormat, Codebook, Floats, Grid, Integers, Levels, blocked
from formats.scale_search import best_of, best_scale, by_rows, grouped, in_chunks, peak
from formats.sums import weighted_error


def _minifloats(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """Every value of a small float without infinities or NaN, by code: sign | exponent | mantissa."""
    bias = 2 ** (exponent_bits - 1) - 1
    positive = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, (code & 2**mantissa_bits - 1) / 2**mantissa_bits
        positive.append(2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa)
    return tuple(positive) + tuple(-value if value else 0.0 for value in positive)


_DOUBLED_E2M1 = Codebook(tuple(2 * value for value in _minifloats(2, 1)))  # integers, as ggml has them


class MX(BlockFormat):
    """E8M0 e | elements;  w = 2^(e−127) · element, computed as 2^(e−128) · unit · level.

    `levels` are the elements times 2 / unit: ggml doubles E2M1 to have integers (unit 1), MXINT8 counts in 64ths.
    """

    block_size = 32
    levels: Levels
    unit: float = 2.0
    largest_exponent: int  # emax

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        if native.serves(weights, self.levels) and self.ggml_type is not None:
            return self._grid(
                by_rows(
                    lambda rows, shared: native.best_exponent(
                        rows, shared, self.levels, self.largest_exponent, self.unit
                    ),
                    weights, importance, 32,
                )
            )  # fmt: skip

        def search(x: Tensor, imp: Tensor) -> tuple[Tensor]:
            _, exponent = torch.frexp(peak(x))  # mantissa in [½, 1)
            plain = exponent - 1 - self.largest_exponent + 127
            scales = [self._scale((plain + step).clamp(0, 254)) for step in (0, 1, -1)]
            return (best_of(scales, x, imp, self.levels, lambda scale: scale),)

        (scale,) = in_chunks(search, *grouped(weights, importance, 32))
        _, exponent = torch.frexp(scale / self.unit)
        return self._grid((exponent + 127).to(torch.uint8).view(weights.shape[0], -1))

    def _scale(self, e: Tensor) -> Tensor:
        """2^(e−128) · unit; the first is subnormal for e < 2, so made of bits. e = 255 is NaN, but not to ggml."""
        e = e.to(torch.int32)
        bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)
        scale = bits.view(torch.float32) * self.unit
        return scale if self.ggml_type is not None else torch.where(e == 255, torch.nan, scale)

    def _grid(self, e: Tensor) -> Grid:
        return Grid(self._scale(e), self.levels, group=32, fields=(e,))

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        data = self.pack_codes(codes.contiguous().view(torch.uint8).view(codes.shape[0], -1, 32))
        return torch.cat([grid.fields[0][:, :, None], data], dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        parts = blocked(blocks, self.block_bytes)
        codes = self.unpack_codes(parts[:, :, 1:].contiguous())
        return codes.view(blocks.shape[0], -1), self._grid(parts[:, :, 0])

    def pack_codes(self, codes: Tensor) -> Tensor:
        """uint8 [rows, blocks, 32] → uint8 [rows, blocks, block_bytes − 1]."""
        return codes

    def unpack_codes(self, data: Tensor) -> Tensor:
        """The inverse of `pack_codes`."""
        return data


@final
class MXFP4(MX):
    """E8M0 e | 16 × (low nibble: w[0:16], high nibble: w[16:32]), E2M1;  w = 2^(e−127)·E2M1."""

    name, ggml_type, block_bytes = "MXFP4", 39, 1 + 16
    levels, unit, largest_exponent = _DOUBLED_E2M1, 1.0, 2

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes, 32)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_nibbles(data, 32)


class _MXFP8(MX):
    ggml_type, block_bytes = None, 1 + 32
    levels: Floats

    def unpack_codes(self, data: Tensor) -> Tensor:
        return data.view(self.levels.dtype)


@final
class MXFP8_E4M3(_MXFP8):
    """E8M0 e | 32 × float8 E4M3;  w = 2^(e−127)·float."""

    name, levels, largest_exponent = "MXFP8_E4M3", Floats(torch.float8_e4m3fn), 8


@final
class MXFP8_E5M2(_MXFP8):
    """E8M0 e | 32 × float8 E5M2;  w = 2^(e−127)·float."""

    name, levels, largest_exponent = "MXFP8_E5M2", Floats(torch.float8_e5m2), 15


class _MXFP6(MX):
    ggml_type, block_bytes = None, 1 + 24

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_stream(codes, 6)

    def unpack_codes(self, data: Tensor) -> Tensor:
        return unpack_stream(data, 6)


@final
class MXFP6_E2M3(_MXFP6):
    """E8M0 e | 32 × 6-bit E2M3;  w = 2^(e−127)·float."""

    name, levels, largest_exponent = "MXFP6_E2M3", Codebook(_minifloats(2, 3)), 2


@final
class MXFP6_E3M2(_MXFP6):
    """E8M0 e | 32 × 6-bit E3M2;  w = 2^(e−127)·float."""

    name, levels, largest_exponent = "MXFP6_E3M2", Codebook(_minifloats(3, 2)), 4


@final
class MXINT8(MX):
    """E8M0 e | 32 × int8 q;  w = 2^(e−127)·q/64."""

    name, ggml_type, block_bytes = "MXINT8", None, 1 + 32
    levels, unit, largest_exponent = Integers(-127, 127), 2.0 / 64, 0

    def unpack_codes(self, data: Tensor) -> Tensor:
        return data.view(torch.int8)


@final
class NVFP4(BlockFormat):
    """4 × UE4M3 s, one for 16 weights | 4 × 8 × (low nibble: w[0:8], high nibble: w[8:16]), E2M1;  w = s·E2M1."""

    name, ggml_type, block_size, block_bytes = "NVFP4", 40, 64, 4 + 32
    levels = _DOUBLED_E2M1
    reach = (12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 13.0, 14.0)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        table, borders = _ue4m3(weights.device)

        def store(scale: Tensor) -> Tensor:
            return table[torch.bucketize(scale.abs(), borders)]

        if native.serves(weights, self.levels):
            scale = by_rows(
                lambda rows, shared: native.best_stored_scale(rows, shared, self.levels, self.reach, (), ue4m3=True),
                weights, importance, 16,
            )  # fmt: skip
        else:
            scale = best_scale(*grouped(weights, importance, 16), self.levels, self.reach, (), store)
        return self._grid(torch.bucketize(scale, borders).to(torch.uint8).view(weights.shape[0], -1))

    def refit(self, grid: Grid, group: int, weights: Tensor, importance: Tensor | None = None) -> Grid:
        x, imp = grouped(weights, importance, 16)
        fresh = self.fit(weights, importance)
        old, new = grid.scale[:, group], fresh.scale[:, 0]
        better = weighted_error(x, imp, new, self.levels) < weighted_error(x, imp, old, self.levels)
        s = grid.fields[0].clone()
        s[:, group] = torch.where(better, fresh.fields[0][:, 0], s[:, group])
        return self._grid(s)

    def tensor_scale(self, weights: Tensor) -> float:
        """UE4M3 has three bits of mantissa from 2⁻⁶ to 448; below, fewer and fewer. Where more than one block in a
        hundred wants such a scale, or any one beyond, the largest is moved two powers below the end: feedback makes
        weights grow."""
        wanted = weights.abs().reshape(-1, 16).amax(1) / 6
        wanted = wanted[wanted > 0]
        end = 448 / 4
        if not len(wanted) or (float((wanted < 2**-6).float().mean()) <= 0.01 and float(wanted.max()) <= end):
            return 1.0
        return 2.0 ** math.ceil(math.log2(float(wanted.max()) / end))

    def _grid(self, s: Tensor) -> Grid:
        return Grid(_ue4m3(s.device)[0][s.to(torch.int64)], self.levels, group=16, fields=(s,))

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        rows = codes.shape[0]
        scales = grid.fields[0].view(rows, -1, 4)
        return torch.cat([scales, pack_nibbles(codes.reshape(rows, -1, 64), 16)], dim=2).view(rows, -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        scales, data = blocked(blocks, self.block_bytes).split((4, 32), dim=2)
        codes = unpack_nibbles(data, 16).view(blocks.shape[0], -1)
        return codes, self._grid(scales.reshape(blocks.shape[0], -1))


@cache
def _ue4m3(device: torch.device) -> tuple[Tensor, Tensor]:
    """Halves of the values of a UE4M3 byte [256] (its first bit is ignored, 0x7F is 0), and the borders between the 127
    that are written [126]: place in between = byte."""
    byte = torch.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7).to(torch.float32)
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    table = torch.where(exponent == 0, torch.ldexp(mantissa, torch.tensor(-9)), normal) / 2
    table[0x7F] = 0.0
    borders = (table[1:127] + table[:126]) / 2
    return table.to(device), borders.to(device)


FORMATS: tuple[BlockFormat, ...] = (
    MXFP4(), NVFP4(), MXFP6_E2M3(), MXFP6_E3M2(), MXFP8_E4M3(), MXFP8_E5M2(), MXINT8(),
)  # fmt: skip
