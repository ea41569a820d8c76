"""GPFQ (arXiv 2110.15352, in its memory-light form): greedy path following, without damping or look-ahead.

    q_t = nearest((G_tt w_t + Σ_{j<t} w_j G_jt − Σ_{j<t} q_j H_jt) / H_tt)

As a sweep: V starts at w_t + Σ_{j≤t} w_j (G − H)_jt / H_tt, and column s takes (w_t − q_t) H_ts / H_ss from column t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formats import BlockFormat, QuantizedWeight
from qronos_export.rounding.least_squares import column_order
from qronos_export.rounding.rounded import Rounded, Settings
from qronos_export.rounding.rtn import rtn
from qronos_export.rounding.sweep import DivergedError, sweep
from qronos_export.statistics import LayerStats


def gpfq(weight: Tensor, stats: LayerStats, fmt: BlockFormat, settings: Settings) -> Rounded:
    """Round `weight` [rows, columns] so that the running sum of Xw is followed; scales are fitted to `weight`."""
    fmt.check(weight.shape[1])
    if not stats.tokens:
        return rtn(weight, stats, fmt, settings, note="no tokens; rounded to nearest")
    hessian = stats.hessian
    drift = stats.cross - hessian
    order = column_order(hessian, settings.order, fmt.block_size)
    diagonal = hessian.diagonal()
    power = torch.where(diagonal > 0, diagonal, 1.0)
    if order is None:
        shift = weight @ drift.triu() / power
        feedback = hessian / power
    else:
        shift = torch.empty_like(weight)
        shift[:, order] = weight[:, order] @ drift[order][:, order].triu() / power[order]
        feedback = hessian[order][:, order] / power[order]
    grid = fmt.fit(weight, diagonal)
    try:
        codes, grid, _ = sweep(
            weight + shift, -feedback, fmt, importance=diagonal, order=order, grid=grid, anchor=weight,
            dither=settings.dither,
        )  # fmt: skip
    except DivergedError as diverged:
        return rtn(weight, stats, fmt, settings, note=f"{diverged}; rounded to nearest")
    packed = QuantizedWeight(fmt, fmt.pack(codes, grid), (weight.shape[0], weight.shape[1]))
    error = grid.values(codes) - weight
    return Rounded(packed, ((error @ hessian) * error).sum(1), None, 0.0, "gpfq")
