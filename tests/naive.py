"""Slow, obvious float64 versions of the rounders: the laws of the tests are stated against these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Nearest = Callable[[Tensor, int], Tensor]  # values [rows] of column j -> stored values


def obq(weight: Tensor, hessian: Tensor, nearest: Nearest) -> Tensor:
    """Optimal brain quantization in natural order: after each column the rest is re-solved exactly."""
    target, q = weight.clone(), torch.zeros_like(weight)
    columns = weight.shape[1]
    for j in range(columns):
        q[:, j] = nearest(target[:, j], j)
        rest = list(range(j + 1, columns))
        if rest:
            # argmin over w_rest of (w − target)H(w − target)ᵀ with w_j = q_j, and all earlier columns settled
            part = hessian[j:, j:]
            error = q[:, j] - target[:, j]
            shift = -torch.linalg.solve(part[1:, 1:], part[1:, 0])
            target[:, j + 1 :] += error[:, None] * shift
    return q


def qronos(weight: Tensor, hessian: Tensor, cross: Tensor, lam: float, nearest: Nearest) -> Tensor:
    """Algorithm 1 of arXiv 2505.11695 as written, with damping: correct the first code, re-solve, diffuse."""
    columns = weight.shape[1]
    eye = torch.eye(columns, dtype=weight.dtype)
    first = (weight @ cross[:, 0] - weight[:, 1:] @ hessian[1:, 0]) / hessian[0, 0]
    q0 = nearest(first, 0)
    damped = hessian + lam * eye
    rest = (weight @ (cross + lam * eye))[:, 1:] - q0[:, None] * hessian[0, 1:]
    solved = torch.linalg.solve(damped[1:, 1:], rest.T).T
    tail = obq(solved, damped[1:, 1:], lambda values, j: nearest(values, j + 1))
    return torch.cat([q0[:, None], tail], dim=1)


def gpfq(weight: Tensor, hessian: Tensor, cross: Tensor, nearest: Nearest) -> Tensor:
    """q_t = nearest((G_tt w_t + Σ_{j<t} w_j G_jt − Σ_{j<t} q_j H_jt) / H_tt), literally."""
    q = torch.zeros_like(weight)
    for t in range(weight.shape[1]):
        value = weight[:, : t + 1] @ cross[: t + 1, t] - q[:, :t] @ hessian[:t, t]
        q[:, t] = nearest(value / hessian[t, t], t)
    return q
