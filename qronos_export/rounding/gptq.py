"""GPTQ (arXiv 2210.17323): error diffusion with the quantized stream's Hessian; and the sweep it shares with Qronos."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from formats import BlockFormat, Grid, QuantizedWeight
from formats.parallel import at_once, one_thread
from qronos_export.precision import product
from qronos_export.rounding.coupled import diffuse_rows
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
    return diffuse(weight, normal, fmt, "ldlq", normal.project(weight, 0.0, settings.ridge)[1], settings)


@calibrated
def gptq(weight: Tensor, normal: Normal, fmt: BlockFormat, settings: Settings) -> Rounded:
    """Round `weight` [rows, columns] so that X̂q stays close to X̂w."""
    _, mismatch = normal.project(weight, 0.0, settings.ridge)
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
    refine codes and scales, where asked to. Rows that `settings.coupled` joins are swept one after another, and the
    loss is computed."""
    importance = normal.hessian.diagonal()
    dither, note, feedback = settings.dither, normal.note, normal.feedback

    def swept(target: Tensor, first: Tensor | None) -> tuple[Tensor, Grid, Tensor]:
        nonlocal dither
        # In descending order no block is met as a whole.
        grid = fmt.fit(target, importance) if settings.order == "descending" else None
        codes, grid, errors = sweep(
            target, feedback, fmt, importance=importance, order=normal.order, grid=grid, first=first,
            dither=dither,
        )  # fmt: skip
        dither = None if dither is None else dither + 1
        if settings.refine:
            return refined(codes, grid, target, normal.damped, fmt, settings.refine)
        return codes, grid, torch.einsum("tr,t->r", errors.square_(), normal.upper.diagonal().pow(-2).to(errors.dtype))

    def round_rows(target: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        codes, grid, _ = swept(target, first)
        return fmt.pack(codes, grid), grid.values(codes)

    if settings.coupled:
        column = 0 if normal.order is None else int(normal.order[0])
        few = len(settings.coupled) * target.shape[1] < at_once(target.device)  # weights rounded in one turn
        with one_thread(target.device) if few else contextlib.nullcontext():
            blocks, values, singular = diffuse_rows(
                target, first, column, settings.coupled, settings.damping, round_rows
            )
        error = target - values
        loss = torch.linalg.vecdot(product(error, normal.hessian) + normal.damping * error, error)
        if singular:
            note = "; ".join(filter(None, [note, f"{singular} heads rounded row by row: what weighs them is singular"]))
    else:
        codes, grid, loss = swept(target, first)
        blocks = fmt.pack(codes, grid)
    packed = QuantizedWeight(fmt, blocks, (target.shape[0], target.shape[1]))
    return Rounded(packed, loss, mismatch, normal.damping, method, note)
