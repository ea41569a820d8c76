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

    alpha: in units of the weights' root mean square.
    """
    largest = torch.linalg.matrix_norm(hessian.double(), ord=2).to(weight.dtype)
    if alpha == 0 or not float(largest) > 0:
        return weight
    scaled = hessian / largest
    threshold = alpha * float(weight.square().mean().sqrt())
    v = weight
    for _ in range(steps):
        v = v - (v - weight) @ scaled
        grouped = v.reshape(-1, group)
        v = (grouped - threshold * project_l1(grouped / threshold)).view_as(weight)
    return v


def project_l1(rows: Tensor) -> Tensor:
    """The nearest point of the ℓ₁ unit ball to every one of `rows` [n, size]."""
    magnitude = rows.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, rows.shape[1] + 1, device=rows.device)
    kept = (ordered > excess).sum(1, keepdim=True).clamp(min=1)
    outside = magnitude.sum(1, keepdim=True) > 1
    shrink = torch.where(outside, excess.gather(1, kept - 1), 0.0)
    return rows.sign() * (magnitude - shrink).clamp(min=0)
