"""After the sweep: new scales for the codes, then new codes for the scales, both under the whole of H.

Each step minimizes (T − Q)(H + λI)(T − Q)ᵀ exactly in what it changes, so the loss never rises: a block's scale is
least squares over its codes, stored as the file can; a code is the nearest to q_j + ((T − Q)(H + λI))_j / (H + λI)_jj.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formats import BlockFormat, Grid
from qronos_export.rounding.sweep import STEP, ColumnGrid


def refined(
    codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor, fmt: BlockFormat, rounds: int
) -> tuple[Tensor, Grid, Tensor]:
    """Better codes [rows, columns] and grid for `target` [rows, columns] under `hessian` [columns, columns], which is
    positive definite, and the loss that is left, [rows]. Formats whose groups share numbers keep their scales."""
    codes = codes.T.contiguous()
    for _ in range(rounds):
        grid = _scales(codes, grid, target, hessian, fmt)
        codes = _descent(codes, grid, target, hessian)
    error = target - grid.values(codes.T)
    return codes.T, grid, torch.linalg.vecdot(error @ hessian, error)


def _scales(codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor, fmt: BlockFormat) -> Grid:
    """Scales of one group after another; those of a row stay where what can be stored is no better."""
    if fmt.rescaled(grid.scale) is None:
        return grid
    levels = grid.levels.value(codes)
    pull = hessian @ (target - grid.values(codes.T)).T
    scale = grid.scale.T.contiguous()
    for group in range(len(scale)):
        own = slice(group * grid.group, (group + 1) * grid.group)
        along = (levels[own] * pull[own]).sum(0)
        power = (levels[own] * (hessian[own, own] @ levels[own])).sum(0)
        stored = fmt.rescaled((scale[group] + torch.where(power > 0, along / power, 0.0))[:, None])
        assert stored is not None
        change = stored.scale[:, 0] - scale[group]
        change = torch.where(2 * change * along > change.square() * power, change, 0.0)
        scale[group] += change
        pull.addmm_(hessian[:, own], levels[own] * change, alpha=-1)
    result = fmt.rescaled(scale.T)
    assert result is not None
    return result


def _descent(codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor) -> Tensor:
    """One code after another, those of all rows at once: [columns, rows]."""
    columns = ColumnGrid(grid, 0)
    values = grid.values(codes.T).T.contiguous()
    pull = hessian @ (target.T - values)
    codes = codes.clone()
    power = hessian.diagonal().tolist()
    for start in range(0, len(codes), STEP):
        panel = slice(start, min(start + STEP, len(codes)))
        near, before = pull[panel].clone(), values[panel].clone()
        for j in range(start, panel.stop):
            codes[j], stored = columns.round(values[j] + near[j - start] / power[j], j // grid.group)
            near.addr_(hessian[panel, j], stored - values[j], alpha=-1)
            values[j] = stored
        pull.addmm_(hessian[:, panel], values[panel] - before, alpha=-1)
    return codes
