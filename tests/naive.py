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


def qronos(
    weight: Tensor, hessian: Tensor, cross: Tensor, lam: float, nearest: Nearest, residual: Tensor | float = 0.0
) -> Tensor:
    """Algorithm 1 of arXiv 2505.11695 as written, with damping: correct the first code, re-solve, diffuse. Outputs XWᵀ
    have R − R̂ added to them, whose product with the inputs is `residual` [rows, columns]."""
    columns = weight.shape[1]
    eye = torch.eye(columns, dtype=weight.dtype)
    asked = weight @ cross + residual
    first = (asked[:, 0] - weight[:, 1:] @ hessian[1:, 0]) / hessian[0, 0]
    q0 = nearest(first, 0)
    damped = hessian + lam * eye
    rest = (asked + lam * weight)[:, 1:] - q0[:, None] * hessian[0, 1:]
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


def ldlq(weight: Tensor, hessian: Tensor, nearest: Nearest) -> Tensor:
    """QuIP's: H = (U + I) D (U + I)ᵀ with U strictly upper; q_k = nearest(w_k + (w − q)_{<k} U_{<k,k})."""
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # RRᵀ = H
    feedback = (upper / upper.diagonal()).triu(1)
    q = torch.zeros_like(weight)
    for k in range(weight.shape[1]):
        q[:, k] = nearest(weight[:, k] + (weight - q)[:, :k] @ feedback[:k, k], k)
    return q


def gptaq(weight: Tensor, hessian: Tensor, cross: Tensor, shrinkage: float, nearest: Nearest) -> Tensor:
    """Optimal brain quantization that also hands w_t (G − H)_t, w the float weights, to columns not yet rounded."""
    original, target, q = weight, weight.clone(), torch.zeros_like(weight)
    for t in range(weight.shape[1]):
        q[:, t] = nearest(target[:, t], t)
        rest = hessian[t + 1 :, t + 1 :]
        if not len(rest):
            break
        error = (q[:, t] - target[:, t])[:, None] * -torch.linalg.solve(rest, hessian[t + 1 :, t])
        drift = torch.linalg.solve(rest, (cross - hessian)[t, t + 1 :])
        target[:, t + 1 :] += error + shrinkage * original[:, t : t + 1] * drift
    return q


def kronecker(
    weight: Tensor,
    outer: Tensor,
    hessian: Tensor,
    nearest: Callable[[Tensor], Tensor],
    first: Tensor | None = None,
) -> Tensor:
    """GPTQ on all of a head's weights as one long row, by the Cholesky factor of the inverse of outer ⊗ hessian.

    first:    [rows], what the first code of each row is chosen by while nothing has been handed to it.
    """
    columns = weight.shape[1]
    upper = torch.linalg.cholesky(torch.linalg.inv(torch.kron(outer, hessian)), upper=True)
    target, q = weight.flatten().clone(), torch.zeros(weight.numel(), dtype=weight.dtype)
    for i in range(len(q)):
        value = target[i]
        if first is not None and i % columns == 0:
            value = value - weight[i // columns, 0] + first[i // columns]
        q[i] = nearest(value)
        target[i + 1 :] -= (target[i] - q[i]) / upper[i, i] * upper[i, i + 1 :]
    return q.view_as(weight)
