"""MagR (arXiv 2406.00800): weights of smaller largest magnitude that compute nearly the same, for few bits.

    argmin_V ½ tr((V − W) H (V − W)ᵀ) / σ₁(H) + α Σ_groups ‖v‖∞

by proximal gradient descent with step one and Nesterov's momentum, with which a hundred steps come as far as a
thousand. The proximal map of a‖·‖∞ brings all that is beyond ±t there, where t lets Σ max(|v| − t, 0) = a. Inputs that
hardly vary cost nothing there, and the range of the grid is spent on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formats import native
from formats.parallel import side_by_side
from qronos_export.precision import product

STEPS = 100
_AT_ONCE = 256  # rows, which stay in a core's cache through all steps


def magr(weight: Tensor, hessian: Tensor, alpha: float, group: int, steps: int = STEPS) -> Tensor:
    """`weight` [rows, columns] with smaller extremes in every `group` of neighbouring columns.

    hessian: XᵀX / n in any unit, [columns, columns].
    alpha:   in units of each row's root mean square.
    """
    largest = spectral_norm(hessian)
    if alpha == 0 or not largest > 0:
        return weight
    scaled = hessian / largest

    def descended(rows: Tensor) -> Tensor:
        paid = alpha * rows.square().mean(1).sqrt()
        paid = paid.repeat_interleave(rows.shape[1] // group)
        v = ahead = rows
        for step in range(steps):
            before, v = v, clipped((ahead - product(ahead - rows, scaled)).view(-1, group), paid).view_as(rows)
            ahead = torch.lerp(before, v, 1 + step / (step + 3))
        return v

    return torch.cat(side_by_side(descended, weight.split(_AT_ONCE), weight.device))


def spectral_norm(hessian: Tensor, steps: int = 30) -> float:
    """The largest eigenvalue of a `hessian` [features, features], from below and closely enough for a step size: power
    iteration from a fixed start."""
    start = torch.randn(len(hessian), 1, generator=torch.Generator().manual_seed(0))
    vector = start.to(hessian)
    for _ in range(steps):
        vector = torch.nn.functional.normalize(hessian @ vector, dim=0)
    return float((hessian @ vector).norm())


def clipped(rows: Tensor, paid: Tensor) -> Tensor:
    """argmin_u ½‖u − v‖² + a‖u‖∞ for every row v of `rows` [n, size] and its a of `paid` [n]."""
    if (peaks := native.peaks(rows, paid)) is None:
        ordered = rows.abs().sort(dim=1, descending=True).values
        counts = torch.arange(1, rows.shape[1] + 1, device=rows.device)
        peaks = ((ordered.cumsum(1) - paid[:, None]) / counts).amax(1).clamp(min=0)
    return rows.clamp(-peaks[:, None], peaks[:, None])
