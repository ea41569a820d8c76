"""GPTQ (arXiv 2210.17323): error diffusion with the quantized stream's Hessian; and the sweep it shares with Qronos."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from formats import BlockFormat, QuantizedWeight
from qronos_export.rounding.least_squares import Normal, SingularError, normal_equations
from qronos_export.rounding.refine import refined
from qronos_export.rounding.rounded import Rounded, Rounder, Settings
from qronos_export.rounding.rtn import rtn
from qronos_export.rounding.sweep import DivergedError, sweep
from qronos_export.statistics import LayerStats


def calibrated(solve: Callable[[Tensor, Normal, BlockFormat, Settings], Rounded]) -> Rounder:
    """A rounder from what it does with the normal equations; where that fails, rounds to nearest and says so."""

    @functools.wraps(solve)
    def rounder(weight: Tensor, stats: LayerStats, fmt: BlockFormat, settings: Settings) -> Rounded:
        fmt.check(weight.shape[1])
        try:
            return solve(
                weight, normal_equations(stats, settings.damping, settings.order, fmt.block_size), fmt, settings
            )
        except (SingularError, DivergedError) as error:
            return rtn(weight, stats, fmt, settings, note=f"{error}; rounded to nearest")

    return rounder


@calibrated
def ldlq(weight: Tensor, normal: Normal, fmt: BlockFormat, settings: Settings) -> Rounded:
    """QuIP's linear feedback (arXiv 2307.13304), which comes to the same as GPTQ."""
    return diffuse(weight, normal, fmt, "ldlq", normal.project(weight, 0.0)[1], settings)


@calibrated
def gptq(weight: Tensor, normal: Normal, fmt: BlockFormat, settings: Settings) -> Rounded:
    """Round `weight` [rows, columns] so that X̂q stays close to X̂w."""
    _, mismatch = normal.project(weight, 0.0)
    return diffuse(weight, normal, fmt, "gptq", mismatch, settings)


def diffuse(
    target: Tensor,
    normal: Normal,
    fmt: BlockFormat,
    method: str,
    mismatch: Tensor,
    settings: Settings,
    first: Tensor | None = None,
) -> Rounded:
    """Sweep `target` [rows, columns]; the loss follows from the bookkeeping Σ e_t² / U_tt², exactly and for free. Then
    refine codes and scales, where asked to."""
    importance = normal.hessian.diagonal()
    # In descending order no block is met as a whole.
    grid = fmt.fit(target, importance) if settings.order == "descending" else None
    codes, grid, errors = sweep(
        target, normal.feedback, fmt, importance=importance, order=normal.order, grid=grid, first=first,
        dither=settings.dither,
    )  # fmt: skip
    loss = torch.einsum("tr,t->r", errors.square_(), normal.upper.diagonal().pow(-2).to(errors.dtype))
    if settings.refine:
        codes, grid, loss = refined(codes, grid, target, normal.damped, fmt, settings.refine)
    rows, columns = target.shape
    packed = QuantizedWeight(fmt, fmt.pack(codes, grid), (rows, columns))
    return Rounded(packed, loss, mismatch, normal.damping, method, normal.note)
