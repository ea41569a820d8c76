"""The column sweep that every rounder with feedback shares.

Columns are rounded one after another; what a column's rounding did wrong is handed to the columns not yet rounded:

    q_t = nearest(V_t);   V_s ← V_s − M_ts · (A_t − q_t)   for all s after t

GPTQ and Qronos: A = V and M_ts = U_ts / U_tt. GPFQ: A = W and M_ts = −H_ts / H_ss. Rows are independent, so the sweep
runs on the transposed weights, where a column is contiguous in memory and all rows of a group of layers go together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formats import BlockFormat, Grid, native
from formats.block import reciprocal

STEP = 32  # columns between two lazy updates of everything to the right


class DivergedError(ArithmeticError):
    """Feedback has grown a weight to infinity."""


def sweep(
    values: Tensor,
    feedback: Tensor,
    fmt: BlockFormat,
    *,
    importance: Tensor,
    order: Tensor | None = None,
    grid: Grid | None = None,
    anchor: Tensor | None = None,
    first: Tensor | None = None,
    step: int = STEP,
    dither: int | None = None,
) -> tuple[Tensor, Grid, Tensor]:
    """Round `values` [rows, columns] to `fmt`, column by column with feedback.

    Raises DivergedError where what is passed on grows beyond every float.

    feedback:    M [columns, columns], upper triangular with a unit diagonal (ignored), in sweep order.
    importance:  [columns], weighs the scale search, in storage order.
    order:       storage column of each step; None sweeps left to right.
    grid:        scales chosen beforehand; None fits each block when the sweep reaches it, on the weights as diffused
                 so far, and what belongs to a group alone once more when it reaches the group. The order then has to
                 meet each block as a whole.
    anchor:      A [rows, columns]; None stands for V itself.
    dither:      a seed: codes are drawn from the two levels around a value, so that their mean is the value.
    first:       [rows], replaces the first column's value when its code is chosen (Qronos' error correction).

    Returns codes [rows, columns] and grid in storage order, and A − q [columns, rows] in sweep order.
    """
    columns, feedback = values.shape[1], feedback.contiguous()
    work = (values if order is None else values[:, order]).T.clone(memory_format=torch.contiguous_format)
    anchors = None if anchor is None else (anchor if order is None else anchor[:, order]).T.contiguous()
    storage = list(range(columns)) if order is None else order.tolist()  # column of each sweep position
    places = torch.tensor(storage)  # on the CPU, wherever the weights are
    position = places.argsort()  # of each storage column
    errors = torch.empty_like(work)
    codes: Tensor | None = None
    grids: dict[int, Grid] = {}  # by the storage column at which their block begins
    current = None if grid is None else ColumnGrid(grid, 0)
    met: set[int] = set()
    dice = None if dither is None else torch.Generator(work.device).manual_seed(dither)

    width = step if grid is not None else math.gcd(step, fmt.block_size)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        if grid is None and start % fmt.block_size == 0:
            begin = storage[start] // fmt.block_size * fmt.block_size
            block = position[begin : begin + fmt.block_size]
            if any(not 0 <= column - begin < fmt.block_size for column in storage[start : start + fmt.block_size]):
                raise ValueError("scales that follow the sweep need an order that meets each block as a whole")
            if not bool(torch.isfinite(work[block]).all()):
                raise DivergedError(f"feedback diverged before column {start} of {columns}")
            own = slice(begin, begin + fmt.block_size)
            grids[begin] = fmt.fit(work[block].T, importance[own])
            current = ColumnGrid(grids[begin], begin)
            met = {(storage[start] - begin) // current.grid.group}
        elif not bool(torch.isfinite(work[start:stop]).all()):
            raise DivergedError(f"feedback diverged before column {start} of {columns}")
        assert current is not None
        if codes is None:
            codes = current.new_codes(work)
        t = start
        while t < stop:
            group = current.group(storage[t])
            if grid is None and group not in met:
                met.add(group)
                first_column = current.begin + group * current.grid.group
                own = slice(first_column, first_column + current.grid.group)
                mine = block[own.start - current.begin : own.stop - current.begin]
                grids[current.begin] = fmt.refit(current.grid, group, work[mine].T, importance[own])
                current = ColumnGrid(grids[current.begin], current.begin)
            end = t + 1
            while end < stop and (grid is not None or current.group(storage[end]) in met):
                end += 1
            current.diffuse(
                work[t:stop], errors[t:end], codes, feedback[t:end, t:stop], places[t:end],
                None if anchors is None else anchors[t:end], first if t == 0 else None, dice,
            )  # fmt: skip
            t = end
        if stop < columns:
            work[stop:].addmm_(feedback[start:stop, stop:].T, errors[start:stop], alpha=-1)
    if not bool(torch.isfinite(errors).all()):
        raise DivergedError(f"feedback diverged in the last of {columns} columns")
    assert codes is not None
    return codes.T, grid if grid is not None else Grid.joined([grids[begin] for begin in sorted(grids)]), errors


class ColumnGrid:
    """A grid whose first column is storage column `begin`, with the scales of all rows side by side in memory."""

    def __init__(self, grid: Grid, begin: int) -> None:
        self.grid, self.begin = grid, begin
        self._scale = grid.scale.T.contiguous()
        self._inverse = reciprocal(self._scale)
        self._offset = None if grid.offset is None else grid.offset.T.contiguous()

    def group(self, column: int) -> int:
        return (column - self.begin) // self.grid.group

    def new_codes(self, work: Tensor) -> Tensor:
        """Room for the codes of `work` [columns, rows]."""
        return torch.empty(work.shape, dtype=self.grid.levels.nearest(work.new_empty(0)).dtype, device=work.device)

    def diffuse(
        self,
        work: Tensor,
        errors: Tensor,
        codes: Tensor,
        feedback: Tensor,
        places: Tensor,
        anchors: Tensor | None,
        first: Tensor | None,
        dice: torch.Generator | None,
    ) -> None:
        """Round as many columns of `work` [reach, rows] as there are `errors` [columns, rows], one after another, and
        take `feedback` [columns, reach] times a column's error from all behind it.

        places: int64 [columns], storage columns: those of `codes`.
        """
        scales = self._scale, self._inverse, self._offset
        levels, size = self.grid.levels, self.grid.group
        if dice is None and native.diffuse(
            work, errors, codes, feedback, places, self.begin, size, levels, scales, anchors, first
        ):
            return
        for t, place in enumerate(places.tolist()):
            code, stored = self.round(first if first is not None and t == 0 else work[t], self.group(place), dice)
            codes[place] = code
            torch.sub(work[t] if anchors is None else anchors[t], stored, out=errors[t])
            work[t + 1 :].addr_(feedback[t, t + 1 :], errors[t], alpha=-1)

    def round(self, values: Tensor, group: int, dice: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Codes and stored values nearest to a column's `values` [rows], or drawn with `dice`."""
        offset = None if self._offset is None else self._offset[group]
        places = (values if offset is None else values - offset) * self._inverse[group]
        if dice is None:
            code = self.grid.levels.nearest(places)
        else:
            uniform = torch.rand(places.shape, generator=dice, device=places.device)
            code = self.grid.levels.dither(places, uniform)
        stored = self.grid.levels.value(code).mul_(self._scale[group])
        return code, stored if offset is None else stored.add_(offset)
