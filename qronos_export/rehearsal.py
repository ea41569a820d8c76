"""What this machine does in a second, and what rounding takes: the run's own code on small random matrices, its memory
counted and its time measured, and carried over to large ones.

Along matrices of one aspect the memory of rounding is A s² + B s, s the side: Hessians and weights, and one block of
columns. Its time is that of its matrix products and, beside these, n (a + b r) for n columns of r rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from formats import BlockFormat, find_format
from qronos_export.artifact.gguf import StoredTensor, Target
from qronos_export.calibration import Group, Matrix
from qronos_export.layers import round_groups
from qronos_export.live import Live
from qronos_export.plan import Mix
from qronos_export.precision import linear, product
from qronos_export.rounding import ROUNDERS, Rounder, Settings
from qronos_export.statistics import LayerStats
from qronos_export.transforms import TRANSFORMS, Goal, InputStats
from qronos_export.transforms.scaling import Scaling

_SIDES = (256, 512)  # columns of the matrices tried; every block size but those of grids divides them
_WIDEST = 8  # rows to a column tried at most; more rows take what these do in proportion
_SQUARE = 1024  # side of the products measured


@dataclass(frozen=True)
class Machine:
    """Float operations a second (a product and a sum are two) in matrix products, and bytes a second: read from memory,
    and written to a disk."""

    float32: float
    bfloat16: float
    float64: float
    memory: float
    disk: float


def measure(folder: Path, device: torch.device) -> Machine:
    """One second of float32 products on `device`, a fifth of one each for the rest; writes 32 MiB below `folder`. In
    bfloat16 tensors in float32 are converted on the way, as in a forward."""
    square = torch.randn(_SQUARE, _SQUARE, device=device)
    in_bfloat16 = linear("bfloat16")
    double, long = square.double(), torch.zeros(1 << 25, device=device)
    flops = 2.0 * _SQUARE**3
    return Machine(
        flops * _per_second(lambda: product(square, square), device, 1.0),
        flops * _per_second(lambda: in_bfloat16(square, square, None), device, 0.2),
        flops * _per_second(lambda: double @ double, device, 0.2),
        long.nbytes * _per_second(lambda: long.sum(), device, 0.2),
        _disk(folder / "measured"),
    )


def _per_second(step: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    step()
    count, begun = 0, time.perf_counter()
    while (taken := time.perf_counter() - begun) < seconds:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return count / taken


def _disk(file: Path) -> float:
    data, begun = bytes(1 << 25), time.perf_counter()
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    file.unlink()
    return len(data) / (time.perf_counter() - begun)


@dataclass(frozen=True)
class Cost:
    """Bytes that are alive at most beside what is given, and seconds."""

    bytes: float
    seconds: float


class Rehearsal:
    """Costs of rounding by the recipe's `rounder` and `settings` on `machine`."""

    def __init__(self, rounder: Rounder, settings: Settings, machine: Machine, device: torch.device) -> None:
        self._rounder, self._settings, self._machine, self._device = rounder, settings, machine, device
        self._try = cache(self._tried)
        self._nearest_try = cache(self._nearest_tried)
        self._factors_try = cache(self._factors_tried)

    def rounding(self, fmt: BlockFormat, rows: int, columns: int, heads: tuple[int, int] | None = None) -> Cost:
        """Of `rows` × `columns` weights together; `heads` of so many rows each are rounded row by row."""
        aspect = min(rows / columns, _WIDEST)
        small, large = (self._try(fmt, max(1, round(aspect * side)), side) for side in _SIDES)
        # Sides are 1 : 2, so A + B s = 4 A − 2 B … solved for A and B of sides in units of the smaller.
        unit, (one, two) = columns / _SIDES[0], (small, large)
        square = max(0.0, (two.bytes - 2 * one.bytes) / 2)
        bytes = square * unit**2 + (one.bytes - square) * unit
        bytes *= max(1.0, rows / columns / _WIDEST)
        products = self.products(rows, columns)
        if heads:  # a sweep of one row of each, as often as a head has rows
            turn = self._try(fmt, heads[0], _SIDES[1]).seconds - self.products(heads[0], _SIDES[1])
            return Cost(bytes, products + max(0.0, turn) * heads[1] * columns / _SIDES[1])
        first, second = (
            max(0.0, cost.seconds - self.products(aspect * side, side))
            for side, cost in zip(_SIDES, (one, two), strict=True)
        )
        by_weight = max(0.0, (second - 2 * first) / 2)  # b · n · r grows with the square
        by_column = max(0.0, first - by_weight)
        return Cost(bytes, products + by_weight * unit**2 * rows / (aspect * columns) + by_column * unit)

    def products(self, rows: float, columns: float) -> float:
        """Seconds of the factorizations and products: two factors, an inverse and two solves in float64; drift, sweep
        and the weights' power in float32."""
        if self._rounder is ROUNDERS["rtn"]:
            return 0.0
        double = (1 / 3 + 1 / 3 + 1) * columns**3 + 2 * rows * columns**2
        single = (2 + 1 + 2 + 4 * self._settings.refine) * rows * columns**2
        return double / self._machine.float64 + single / self._machine.float32

    def nearest(self, fmt: BlockFormat, rows: int, columns: int) -> Cost:
        """Of weights rounded to nearest without statistics: all of it goes by rows."""
        side = -(-columns // fmt.block_size) * fmt.block_size
        few, many = (self._nearest_try(fmt, count, side) for count in (1024, 2048))
        slope = max(0.0, many.bytes - few.bytes) / 1024
        pace = max(0.0, many.seconds) / 2048
        return Cost(max(few.bytes, few.bytes + slope * (rows - 1024)), pace * rows)

    def factors(self, name: str, format: str, columns: int) -> Cost:
        """Of a transform's search for factors of one group of matrices, on a thousand rows."""
        small, large = (self._factors_try(name, format, side) for side in _SIDES)
        unit = columns / _SIDES[0]
        square = max(0.0, (large.bytes - 2 * small.bytes) / 2)
        return Cost(
            square * unit**2 + (small.bytes - square) * unit,
            large.seconds * columns / _SIDES[1] + 4 / 3 * columns**3 / self._machine.float64,
        )

    def _tried(self, fmt: BlockFormat, rows: int, columns: int) -> Cost:
        if columns % fmt.block_size:  # one of the grids: with one scale for a row
            fmt = find_format(fmt.name.partition("_G")[0], columns)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2 * columns, columns, generator=generator).to(self._device)
        stats = LayerStats(columns, self._device)
        stats.update(x[::2], x[::2] + x[1::2] / 16)
        if self._settings.held_out:
            stats.update(x[1::2], x[1::2] + x[::2] / 16, held=True)
        return self._run(fmt, rows, columns, stats, self._rounder, self._settings)

    def _nearest_tried(self, fmt: BlockFormat, rows: int, columns: int) -> Cost:
        return self._run(fmt, rows, columns, LayerStats(0), ROUNDERS["rtn"], Settings(0.0, 0.0, "natural"))

    def _run(
        self, fmt: BlockFormat, rows: int, columns: int, stats: LayerStats, rounder: Rounder, settings: Settings
    ) -> Cost:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(rows, columns, generator=generator).to(self._device)
        place = torch.arange(rows)
        ahead = _Ahead(StoredTensor("tried", "F32", (rows, columns), 0, 4 * rows * columns), place)
        mix = Mix(fmt.name, 0, {"tried": fmt.name}, ["tried"], {})

        def once() -> None:
            group = Group([Matrix("tried", weight, weight)], stats)
            kept = weight.clone()
            for _ in round_groups([group], ahead, mix, rounder, settings, ahead):
                pass
            weight.copy_(kept)

        begun = time.perf_counter()
        once()
        seconds = time.perf_counter() - begun
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # parts of large tensors go to threads of their own otherwise, unseen
        try:
            with Live() as live:
                once()
        finally:
            torch.set_num_threads(threads)
        return Cost(live.peak - weight.nbytes, seconds)

    def _factors_tried(self, name: str, format: str, columns: int) -> Cost:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2 * columns, columns, generator=generator).to(self._device)
        weight = torch.randn(1024, columns, generator=generator).to(self._device)
        inputs = InputStats(x.T @ x / len(x), x.abs().amax(0), x[:512])
        transform = TRANSFORMS[name](Goal(format, 0))
        assert isinstance(transform, Scaling)
        begun = time.perf_counter()
        transform.factors([weight], inputs, lambda s: s)
        seconds = time.perf_counter() - begun
        with Live() as live:
            transform.factors([weight], inputs, lambda s: s)
        return Cost(live.peak, seconds)


def searches(name: str) -> bool:
    """Whether a transform searches factors for groups of matrices."""
    return isinstance(TRANSFORMS[name](Goal("Q4_0", 0)), Scaling)


class _Ahead:
    """Destinations and Store of a matrix that goes nowhere."""

    def __init__(self, tensor: StoredTensor, rows: Tensor) -> None:
        self._tensor, self._rows = tensor, rows

    def claim(self, weights: Mapping[str, Tensor]) -> None:
        pass

    def forget(self) -> None:
        pass

    def targets(self, name: str) -> list[Target]:
        return [Target("tried", name, self._rows, self._rows)]

    def tensor(self, target: Target) -> StoredTensor:
        return self._tensor

    def may_have_scale(self, tensor: str) -> bool:
        return False

    def put(self, *_: object) -> None:
        pass
