"""What stored numbers look like: scales, zeros, rms, and what cannot be right. Read in chunks; any bytes will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats import BlockFormat, Grid
from formats.block import Integers
from qronos_export.errors import ArtifactError

CHUNK = 1 << 18  # weights read at a time
_LARGEST = 65504.0  # of fp16


@dataclass
class Statistics:
    """Counts over a tensor; `add` takes a part of it. `blocks` stays 0 where single floats are stored."""

    weights: int = 0
    zeros: int = 0
    squares: float = 0.0  # Σ of finite weights
    largest: float = 0.0
    bad_values: int = 0  # NaN, infinite
    too_large: int = 0  # beyond fp16
    blocks: int = 0
    zero_blocks: int = 0
    scales: tuple[float, float] | None = None  # least and largest magnitude
    bad_scales: int = 0  # blocks with a NaN or infinite one
    impossible: int = 0  # blocks with scales that the type does not have
    odd_codes: int = 0

    def add(self, values: Tensor, scales: Tensor | None = None, bad: Tensor | None = None) -> None:
        """`values` [blocks, weights] of blocks with `scales` [blocks, any], or of plain floats; blocks that are `bad`
        [blocks] have numbers beside their scales that are not finite."""
        sizes = values.abs()
        largest = float(sizes.amax())  # NaN where one is
        if not math.isfinite(largest):
            finite = values.isfinite()
            self.bad_values += int((~finite).sum())
            sizes = torch.where(finite, sizes, 0.0)
            largest = float(sizes.amax())
        if largest > _LARGEST:
            self.too_large += int((sizes > _LARGEST).sum())
        filled = values.count_nonzero(1)
        self.weights += values.numel()
        self.zeros += values.numel() - int(filled.sum())
        self.squares += float((sizes if largest < 1e12 else sizes.double()).square().sum(1).double().sum())
        self.largest = max(self.largest, largest)
        if scales is None:
            return
        good = scales.isfinite()
        self.blocks += len(values)
        self.zero_blocks += int((filled == 0).sum())
        self.bad_scales += int((~good.all(1) if bad is None else ~good.all(1) | bad).sum())
        if (ends := scales[good].abs()).numel():
            low, high = (float(end) for end in ends.aminmax())
            self.scales = (low, high) if self.scales is None else (min(low, self.scales[0]), max(high, self.scales[1]))

    def complaints(self) -> Iterator[str]:
        """What cannot be right."""
        if self.bad_scales:
            yield f"{self.bad_scales} of {self.blocks} blocks have NaN or infinite scales"
        elif self.bad_values:
            yield f"{self.bad_values} of {self.weights} values are NaN or infinite"
        if self.impossible:
            yield f"{self.impossible} of {self.blocks} blocks have impossible scales: no quantizer writes them"
        if self.blocks and self.too_large:
            yield f"impossible scales make {self.too_large} values larger than {_LARGEST:g}, fp16's end"

    @property
    def all_zero(self) -> bool:
        return 0 < self.weights == self.zeros

    def to_json(self) -> dict[str, Any]:
        return {
            "scale_range": None if self.scales is None else list(self.scales),
            "zero_codes": self.zeros / self.weights if self.weights else None,
            "zero_blocks": self.zero_blocks / self.blocks if self.blocks else None,
            "rms": math.sqrt(self.squares / self.weights) if self.weights else None,
            "largest": self.largest,
        }


def chunks(path: Path, offset: int, size: int, step: int) -> Iterator[bytearray]:
    """Bytes `offset` … `offset + size` of a file, `step` at a time. Raises ArtifactError where it ends before."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for start in range(0, size, step):
                data = bytearray(min(step, size - start))
                if file.readinto(data) < len(data):
                    raise ArtifactError(f"{path} became shorter while it was read.")
                yield data
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error


def of_blocks(fmt: BlockFormat, parts: Iterable[bytearray]) -> Statistics:
    """Of a tensor of `fmt` whose bytes come in `parts` of whole blocks."""
    found = Statistics()
    for part in parts:
        data = torch.frombuffer(part, dtype=torch.uint8)
        blocks = data.view(1, -1) if fmt.is_float else data.view(-1, fmt.block_bytes)
        codes, grid = fmt.unpack(blocks)
        if fmt.is_float:
            found.add(grid.levels.value(codes))
            continue
        offsets = None if grid.offset is None else ~grid.offset.isfinite().all(1)
        found.add(grid.values(codes), grid.scale, offsets)
        if fmt.name in _IMPOSSIBLE:
            found.impossible += int(_IMPOSSIBLE[fmt.name](grid).any(1).sum())
        if isinstance(grid.levels, Integers) and not _within(codes, grid.levels):
            found.odd_codes += int(((codes < grid.levels.low) | (codes > grid.levels.high)).sum())
    return found


def _within(codes: Tensor, levels: Integers) -> bool:
    least, most = codes.aminmax()
    return levels.low <= int(least) and int(most) <= levels.high


def _negative(grid: Grid) -> Tensor:
    return (grid.fields[0] < 0) | (grid.fields[1] < 0)


_IMPOSSIBLE: dict[str, Callable[[Grid], Tensor]] = {  # [blocks, any]
    "MXFP4": lambda grid: grid.fields[0] == 255,  # NaN of E8M0
    "NVFP4": lambda grid: grid.fields[0] >= 127,  # NaN of UE4M3, and negative ones
    **dict.fromkeys(("Q2_K", "Q4_K", "Q5_K"), _negative),  # d and dmin: signs are in codes and sub-minimums
}
