"""MagR (arXiv 2406.00800): weights of smaller largest magnitude that compute nearly the same, for few bits.

    argmin_V ½ tr((V − W) H (V − W)ᵀ) / σ₁(H) + α Σ_groups ‖v‖∞

by proximal gradient descent with step one; the proximal map of a‖·‖∞ is v − a·P(v / a), P projects on the ℓ₁ ball.
Inputs that hardly vary cost nothing there, and the range of the grid is spent on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 50


def magr(weight: Tensor, hessian: Tensor, alpha: float, group: int, steps: int = STEPS) -> Tensor:
    """`weight` [rows, columns] with smaller extremes in every `group` of neighbouring columns.

    alpha: in units of each row's root mean square.
    """
    largest = spectral_norm(hessian)
    if alpha == 0 or not largest > 0:
        return weight
    scaled = hessian / largest
    threshold = (alpha * weight.square().mean(1).sqrt()).clamp(min=1e-30)
    threshold = threshold.repeat_interleave(weight.shape[1] // group)[:, None]
    v = weight
    for _ in range(steps):
        v = v - (v - weight) @ scaled
        grouped = v.reshape(-1, group)
        v = (grouped - threshold * project_l1(grouped / threshold)).view_as(weight)
    return v


def spectral_norm(hessian: Tensor, steps: int = 30) -> float:
    """The largest eigenvalue, from below and closely enough for a step size: power iteration from a fixed start."""
    vector = torch.ones(len(hessian), 1, dtype=hessian.dtype, device=hessian.device)
    for _ in range(steps):
        vector = torch.nn.functional.normalize(hessian @ vector, dim=0)
    return float((hessian @ vector).norm())


def project_l1(rows: Tensor) -> Tensor:
    """The nearest point of the ℓ₁ unit ball to every one of `rows` [n, size]."""
    magnitude = rows.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, rows.shape[1] + 1, device=rows.device)
    kept = (ordered > excess).sum(1, keepdim=True).clamp(min=1)
    outside = magnitude.sum(1, keepdim=True) > 1
    shrink = torch.where(outside, excess.gather(1, kept - 1), 0.0)
    return rows.sign() * (magnitude - shrink).clamp(min=0)
