"""The types every format is made of: `Levels`, `Grid`, `BlockFormat` and `QuantizedWeight`.

A grid holds only numbers that the bytes can hold, so whatever is rounded to it is already what the file will say.
Nothing here knows about models, calibration or files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, final

import torch
from torch import Tensor

from formats.parallel import at_once, side_by_side


class FormatError(ValueError):
    """Weights and a format do not fit together; the message says which and what would."""


class Levels(Protocol):
    """The numbers a code stands for, before scale and offset."""

    def nearest(self, values: Tensor) -> Tensor:
        """Codes of the levels nearest to `values`, elementwise."""
        ...

    def value(self, codes: Tensor) -> Tensor:
        """The levels themselves, float32."""
        ...

    def snap(self, values: Tensor) -> Tensor:
        """The levels nearest to `values`: `value(nearest(values))`, in place where that is faster. Float32."""
        ...

    def dither(self, values: Tensor, uniform: Tensor) -> Tensor:
        """Codes of one of the two levels around each of `values`, of the upper one where `uniform`, drawn from [0, 1),
        is below the share of the way to it; so the level is the value in the mean. The end where values are beyond."""
        ...


@dataclass(frozen=True)
class Integers:
    """Levels low, low + 1, … high; a code is the integer itself, in int8, or in uint8 where none is negative."""

    low: int
    high: int

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp_(self.low, self.high).to(torch.int8 if self.low < 0 else torch.uint8)

    def value(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def snap(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(self.low, self.high)

    def beside(self, levels: Tensor, steps: int) -> Tensor:
        """The levels so many places above `levels`, or below; the last where there is none."""
        return (levels + steps).clamp_(self.low, self.high)

    def dither(self, values: Tensor, uniform: Tensor) -> Tensor:
        return self.nearest((values - uniform).ceil_())


@dataclass(frozen=True)
class Codebook:
    """Levels listed one by one, in any order; a code is a place in the list, in uint8."""

    levels: tuple[float, ...]

    def nearest(self, values: Tensor) -> Tensor:
        return self._look_up(values, 1)

    def value(self, codes: Tensor) -> Tensor:
        table = cells(self.levels, codes.device)[0]
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)

    def snap(self, values: Tensor) -> Tensor:
        return self._look_up(values, 2)

    def beside(self, levels: Tensor, steps: int) -> Tensor:
        """The same by size."""
        ascending = torch.tensor(sorted(set(self.levels)), device=levels.device)
        places = torch.searchsorted(ascending, levels.contiguous()) + steps
        return ascending[places.clamp_(0, len(ascending) - 1)]

    def dither(self, values: Tensor, uniform: Tensor) -> Tensor:
        return _dithered(cells(self.levels, values.device)[0], values, uniform)

    def _look_up(self, values: Tensor, table: int) -> Tensor:
        *tables, low, per_unit = cells(self.levels, values.device)
        cell = (values * per_unit).ceil_().sub_(low).clamp_(0, len(tables[1]) - 1).to(torch.int32)
        return tables[table].index_select(0, cell.reshape(-1)).view(values.shape)


Cells = tuple[Tensor, Tensor, Tensor, int, int]
_CELLS: dict[tuple[tuple[float, ...], torch.device], Cells] = {}


def cells(levels: tuple[float, ...], device: torch.device) -> Cells:
    """A codebook as tables: levels by code; code and level by cell. Then the first cell, and the cells per unit.

    Borders between neighbouring levels are dyadic, so the line is cut into even cells none of which holds a border
    inside: one look-up finds the nearest level, where a search would take log2 n steps. Tables last as long as the
    process, whichever of several threads makes them, since compiled loops read them where they lie.
    """
    found = _CELLS.get((levels, device))
    return found or _CELLS.setdefault((levels, device), _cells(levels, device))


def _cells(levels: tuple[float, ...], device: torch.device) -> Cells:
    table = torch.tensor(levels, dtype=torch.float64)
    ascending, order = table.sort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)  # of equal levels: the code that is written
    first[1:] = ascending[1:] != ascending[:-1]
    ascending, order = ascending[first], order[first]
    borders = (ascending[1:] + ascending[:-1]) / 2
    per_unit = next(2**k for k in range(12) if torch.equal((borders * 2**k).round(), borders * 2**k))
    low, high = int(borders[0] * per_unit), int(borders[-1] * per_unit) + 1
    codes = order[torch.bucketize(torch.arange(low, high + 1) / per_unit, borders)]
    by_code = table.to(torch.float32)
    return by_code.to(device), codes.to(torch.uint8).to(device), by_code[codes].to(device), low, per_unit


@dataclass(frozen=True)
class Floats:
    """Every finite number of a float type; a code is that float."""

    dtype: torch.dtype

    def nearest(self, values: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype)

    def value(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def snap(self, values: Tensor) -> Tensor:
        return self.value(self.nearest(values))

    def dither(self, values: Tensor, uniform: Tensor) -> Tensor:
        codes = _every_float(self.dtype, values.device)
        return codes[_dithered(codes.to(torch.float32), values, uniform).to(torch.int64)]


@cache
def _every_float(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The finite numbers of an 8-bit float type, each once."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[torch.isfinite(every.to(torch.float32))].to(torch.float32).unique()
    return finite.to(dtype).to(device)


def _dithered(levels: Tensor, values: Tensor, uniform: Tensor) -> Tensor:
    """Places in `levels` [n], in any order: uint8, the shape of `values`."""
    ascending, order = levels.sort(stable=True)
    above = torch.bucketize(values, ascending).clamp_(1, len(levels) - 1)
    low, high = ascending[above - 1], ascending[above]
    upper = uniform * (high - low) < values - low
    return order[torch.where(upper, above, above - 1)].to(torch.uint8)


@dataclass(frozen=True)
class Grid:
    """What a format can store for some weights once its scales are chosen: `value = scale · level(code) + offset`.

    scale:   float32 [rows, groups]; column c uses group c // group.
    offset:  like scale, or None for zero.
    fields:  what the format's `pack` needs to write the scales, each [rows, blocks or groups].
    """

    scale: Tensor
    levels: Levels
    group: int
    offset: Tensor | None = None
    fields: tuple[Tensor, ...] = ()

    def _spread(self, per_group: Tensor, columns: int) -> Tensor:
        return per_group.repeat_interleave(self.group, dim=1)[:, :columns]

    def nearest(self, weights: Tensor) -> Tensor:
        """Codes [rows, columns] of the storable values nearest to `weights` [rows, columns]."""
        from formats import native  # which knows what levels are

        inverse = reciprocal(self.scale)
        if isinstance(self.levels, Integers) and weights.numel() == inverse.numel() * self.group:
            codes = native.nearest(weights, inverse, self.offset, self.levels)
            if codes is not None:
                return codes
        inverse = self._spread(inverse, weights.shape[1])
        if self.offset is not None:
            weights = weights - self._spread(self.offset, weights.shape[1])
        return self.levels.nearest(weights * inverse)

    def values(self, codes: Tensor) -> Tensor:
        """Stored values, float32 [rows, columns]."""
        values = self.levels.value(codes) * self._spread(self.scale, codes.shape[1])
        return values if self.offset is None else values + self._spread(self.offset, codes.shape[1])

    @staticmethod
    def joined(grids: Sequence[Grid]) -> Grid:
        """One grid over the columns of several, left to right."""
        first = grids[0]
        return Grid(
            scale=torch.cat([grid.scale for grid in grids], dim=1),
            levels=first.levels,
            group=first.group,
            offset=None
            if first.offset is None
            else torch.cat([g.offset for g in grids if g.offset is not None], dim=1),
            fields=tuple(torch.cat(parts, dim=1) for parts in zip(*(grid.fields for grid in grids), strict=True)),
        )


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 (a block of zeros) or its inverse would overflow."""
    inverse = scale.reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


class BlockFormat(ABC):
    """A way to store rows of weights as blocks of bytes.

    Every subclass is final and describes its layout in its docstring. Laws, checked for every entry of `FORMATS`:
    `pack(*unpack(blocks)) == blocks` up to equivalent zeros, `dequantize` equals ggml's bit for bit, and the error of
    `fit` is never above that of ggml's own quantizer.
    """

    name: str
    ggml_type: int | None  # None: no GGUF file can hold it
    block_size: int
    block_bytes: int
    is_float: bool = False

    @abstractmethod
    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        """Storable scales for `weights` [rows, columns] with small Σ importance · (weights − nearest)².

        importance: non-negative, broadcastable to `weights`; None weighs all columns alike.
        """

    def refit(self, grid: Grid, group: int, weights: Tensor, importance: Tensor | None = None) -> Grid:
        """`grid` of one block with the scale of one `group` chosen anew for `weights` [rows, grid.group].

        What the block's groups share stays, so this is for super-blocks: while a sweep rounds their first groups, the
        weights of the others move. Never worse than `grid` for these weights.
        """
        return grid

    def rescaled(self, scale: Tensor) -> Grid | None:
        """The grid with the storable scales nearest to `scale` [rows, groups]; None where a group's values need more
        than a real scale of its own."""
        return None

    def tensor_scale(self, weights: Tensor) -> float:
        """A power of two that a whole matrix [rows, columns] is better divided by before it is fitted, where the
        artifact can keep it beside the tensor; 1 where it suits the format as it is."""
        return 1.0

    @abstractmethod
    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        """Bytes, uint8 [rows, row_bytes], of `codes` [rows, columns] on `grid`."""

    @abstractmethod
    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        """Codes [rows, columns] and grid of `blocks`, uint8 [rows, row_bytes]."""

    @final
    def dequantize(self, blocks: Tensor) -> Tensor:
        """Stored values of `blocks`: float32 [rows, columns], bit for bit what ggml computes."""
        columns = blocks.shape[1] // self.block_bytes * self.block_size
        values = torch.empty(len(blocks), columns, device=blocks.device)
        step = max(1, at_once(blocks.device) // columns)

        def write(start: int) -> None:
            codes, grid = self.unpack(blocks[start : start + step])
            values[start : start + step] = grid.values(codes)

        side_by_side(write, range(0, len(blocks), step), blocks.device)
        return values

    @final
    def quantize(self, weights: Tensor, importance: Tensor | None = None) -> Tensor:
        """Blocks of `weights` rounded to the nearest value of their fitted grid: uint8 [rows, row_bytes].

        Raises FormatError unless all weights are finite and rows divide into blocks.
        """
        self.check(weights.shape[1])
        blocks = torch.empty(len(weights), self.row_bytes(weights.shape[1]), dtype=torch.uint8, device=weights.device)
        step = max(1, at_once(weights.device) // weights.shape[1])

        def write(start: int) -> None:
            rows = slice(start, start + step)
            if not all(math.isfinite(end) for end in (weights[rows].amin(), weights[rows].amax())):
                raise FormatError(f"weights hold NaN or infinity; {self.name} cannot store them")
            part = importance if importance is None or importance.ndim == 1 else importance[rows]
            grid = self.fit(weights[rows], part)
            blocks[rows] = self.pack(grid.nearest(weights[rows]), grid)

        side_by_side(write, range(0, len(weights), step), weights.device)
        return blocks

    @final
    def row_bytes(self, columns: int) -> int:
        self.check(columns)
        return columns // self.block_size * self.block_bytes

    @final
    def check(self, columns: int) -> None:
        """Raises FormatError unless rows of `columns` weights divide into whole blocks."""
        if columns % self.block_size:
            raise FormatError(f"rows of {columns} weights do not divide into {self.name}'s blocks of {self.block_size}")

    @property
    @final
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as it will be stored: `blocks` uint8 [rows, row_bytes] of `format`, standing for float32 `shape`."""

    format: BlockFormat
    blocks: Tensor
    shape: tuple[int, int]

    def dequantize(self) -> Tensor:
        return self.format.dequantize(self.blocks)


def blocked(blocks: Tensor, block_bytes: int) -> Tensor:
    """[rows, row_bytes] → [rows, blocks, block_bytes]."""
    return blocks.view(blocks.shape[0], -1, block_bytes)


def half_bytes(values: Tensor) -> Tensor:
    """Scales as the two little-endian bytes of their fp16: [rows, blocks] → uint8 [rows, blocks, 2]."""
    return values.to(torch.float16).contiguous().view(torch.uint8).view(*values.shape, 2)


def half_from_bytes(data: Tensor) -> Tensor:
    """The inverse of `half_bytes`: uint8 [rows, blocks, 2] → float32 [rows, blocks]."""
    aligned = data.clone(memory_format=torch.contiguous_format)  # a slice may begin at an odd byte
    return aligned.view(-1).view(torch.float16).view(data.shape[:-1]).to(torch.float32)
