"""Blocks of a format ↔ what ONNX multiplies with: integers of 2, 4 or 8 bits, scales, zero points, offsets.

    w = scale · (code − zero) + offset      0 ≤ code < 2^bits; scale and zero for `block` columns, offset for `group`

The same numbers, never rounded again: levels that are no integers are multiplied by a power of two and their scale
divided by it, codes get the fewest bits that hold them, and a scale of more columns than ONNX allows is written several
times. An offset stays a number of its own: as a zero point, offset / scale, it could not be where the scale is 0.

What has no such form (levels that need more than 8 bits, scales of less than 16 columns) has no container.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formats import BlockFormat, IntegerGrid
from formats.bits import pack_consecutive, unpack_consecutive
from formats.block import Codebook, Integers, Levels

_CHUNK = 1 << 22  # weights converted at a time
MX_TYPES = ("MXFP4", "MXFP8_E4M3", "MXFP8_E5M2")
"""Formats whose elements and scales are types of ONNX's own."""
BLOCKS = (256, 128, 64, 32, 16)  # of MatMulNBits and GatherBlockQuantized


@dataclass(frozen=True)
class Parts:
    """Rows of a weight as they are stored.

    codes:    uint8 [rows, columns · bits / 8], neighbours share a byte, the first lowest.
    scales:   float32 [rows, columns / block].
    zeros:    uint8 [rows, ⌈columns / block · bits / 8⌉], packed likewise; None stands for 2^(bits − 1) everywhere.
    offsets:  float32 [rows, columns / group], or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros, self.offsets) if part is not None)


@dataclass(frozen=True)
class Container:
    """How the weights of `format` are stored.

    lift:   what levels are multiplied with, a power of two that makes integers of them.
    zero:   the code of level 0 where it is the same everywhere, or None: each block has its own.
    """

    format: BlockFormat
    bits: int
    block: int
    group: int
    lift: int
    zero: int | None
    offset: bool

    @property
    def centred(self) -> bool:
        """Whether codes are centred, so that no zero points need to be stored."""
        return self.zero == 2 ** (self.bits - 1)

    def pack(self, blocks: Tensor, factor: float = 1.0) -> Parts:
        """`blocks` uint8 [rows, row_bytes], whose values are multiplied by `factor`, a power of two."""
        step = max(1, _CHUNK // (blocks.shape[1] // self.format.block_bytes * self.format.block_size))
        parts = [self._pack(part, factor) for part in blocks.split(step)]
        joined = (
            None if first is None else torch.cat([each for each in found if each is not None])
            for first, *rest in zip(*parts, strict=True)
            for found in [[first, *rest]]
        )
        codes, scales, zeros, offsets = joined
        assert codes is not None and scales is not None
        return Parts(codes, scales, zeros, offsets)

    def _pack(self, blocks: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        codes, grid = self.format.unpack(blocks)
        levels = grid.levels.value(codes).mul_(self.lift)
        scales = (grid.scale * (factor / self.lift)).repeat_interleave(self.group // self.block, dim=1)
        if self.zero is None:
            zeros = grid.fields[1].repeat_interleave(self.group // self.block, dim=1)
        else:
            zeros = torch.full_like(scales, self.zero)
            levels += self.zero
        offsets = grid.offset * factor if self.offset and grid.offset is not None else None
        packed = pack_consecutive(levels.to(torch.uint8), self.bits)
        return packed, scales, None if self.centred else self._pack_zeros(zeros), offsets

    def _pack_zeros(self, zeros: Tensor) -> Tensor:
        padding = -zeros.shape[1] % (8 // self.bits)
        return pack_consecutive(torch.nn.functional.pad(zeros, (0, padding)).to(torch.uint8), self.bits)

    def values(self, parts: Parts) -> Tensor:
        """What `parts` stand for: float32 [rows, columns]."""
        levels = unpack_consecutive(parts.codes, self.bits).to(torch.float32)
        if parts.zeros is None:
            levels -= 2 ** (self.bits - 1)
        else:
            zeros = unpack_consecutive(parts.zeros, self.bits)[:, : parts.scales.shape[1]]
            levels -= zeros.to(torch.float32).repeat_interleave(self.block, dim=1)
        levels *= parts.scales.repeat_interleave(self.block, dim=1)
        return levels if parts.offsets is None else levels + parts.offsets.repeat_interleave(self.group, dim=1)


def container(fmt: BlockFormat) -> Container | None:
    """What holds the weights of `fmt` exactly, or None where nothing does."""
    _, grid = fmt.unpack(torch.zeros(1, fmt.block_bytes, dtype=torch.uint8))
    block = next((size for size in BLOCKS if grid.group % size == 0), None)
    ends = None if fmt.is_float else _integers(grid.levels)
    if block is None or ends is None:
        return None
    low, high, lift = ends
    bits = next((bits for bits in (2, 4, 8) if high - low < 2**bits), None)
    if bits is None:
        return None
    if isinstance(fmt, IntegerGrid) and not fmt.symmetric:
        return Container(fmt, bits, block, grid.group, lift, None, offset=False)
    half = 2 ** (bits - 1)
    centred = grid.offset is None and -half <= low and high < half
    return Container(fmt, bits, block, grid.group, lift, half if centred else -low, grid.offset is not None)


def _integers(levels: Levels) -> tuple[int, int, int] | None:
    """The least and the largest of `levels`, times the power of two, given third, that makes integers of them all."""
    if isinstance(levels, Integers):
        return levels.low, levels.high, 1
    if not isinstance(levels, Codebook):
        return None
    for lift in (1, 2, 4, 8, 16):
        lifted = [float(level * lift) for level in levels.levels]
        if all(level.is_integer() for level in lifted):
            return int(min(lifted)), int(max(lifted)), lift
    return None
