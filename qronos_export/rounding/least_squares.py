"""The damped normal equations behind GPTQ and Qronos: factorization, projection, column order.

    U upper triangular with UᵀU = (H + λI)⁻¹,   λ = α · mean(diag H)

With R upper triangular and RRᵀ = H + λI (a Cholesky factorization from the last column to the first), U = R⁻¹. One
factorization and one triangular inverse, in float64; GPTQ's textbook route takes two factorizations and a full inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qronos_export.precision import product
from qronos_export.statistics import LayerStats

_TRIES = 3
_SOLVED = 128  # columns of a triangular matrix that is inverted at once
_WELL_CONDITIONED = 0.1  # of mean(diag H): with so much on the diagonal float32 is exact enough for a correction


class SingularError(ArithmeticError):
    """H + λI stayed indefinite after damping was raised three times."""


@dataclass(frozen=True)
class Normal:
    """One group's normal equations, in sweep order.

    hessian, cross: float32 [features, features] with something small on the diagonal of dead columns, in storage order.
    residual:       D [rows, features] where the rows at hand write to the residual stream, or None.
    upper:          U, float64, in sweep order.
    damping:        the λ that was needed, in units of H.
    unit:           mean(diag H) over columns that are not dead.
    note:           empty, or what had to be done differently.
    """

    hessian: Tensor
    cross: Tensor
    upper: Tensor
    damping: float
    unit: float
    order: Tensor | None
    note: str
    residual: Tensor | None = None

    @property
    def feedback(self) -> Tensor:
        """M_ts = U_ts / U_tt, float32."""
        return (self.upper / self.upper.diagonal()[:, None]).to(torch.float32).contiguous()

    @property
    def damped(self) -> Tensor:
        """H + λI, float32, in storage order."""
        damped = self.hessian.clone()
        damped.diagonal().add_(self.damping)
        return damped

    def project(self, weight: Tensor, shrinkage: float, ridge: float | None = None) -> tuple[Tensor, Tensor]:
        """The least-squares weights V = W + βW(G − H)(H + ρI)⁻¹ for inputs X̂ and outputs XWᵀ; ρ = `ridge` · unit, or λ.

        With ρ = λ and β = 1 that is the paper's W(G + λI)(H + λI)⁻¹. Where outputs are added to R and R̂, which differ
        already, the drift W(G − H) has D beside it. Returns V [rows, features] and, per row, the squared output error
        that V recovers at β = 1, drift (H + ρI)⁻¹ driftᵀ: what GPTQ leaves on the table. [rows]

        Raises SingularError where H + ρI is not positive definite.
        """
        drift = product(weight, (self.cross - self.hessian).T.contiguous())
        if self.residual is not None:
            drift += self.residual
        if ridge is not None:
            for dtype in (torch.float32, torch.float64)[ridge < _WELL_CONDITIONED :]:
                matrix = self.hessian.to(dtype, copy=True)
                matrix.diagonal().add_(ridge * self.unit)
                lower, info = torch.linalg.cholesky_ex(matrix)
                if not int(info):
                    break
            if int(info):
                raise SingularError(f"H + ρI is not positive definite with ρ = {ridge * self.unit:.3g}")
            half = torch.linalg.solve_triangular(lower, drift.T.to(lower.dtype), upper=False)
            step = torch.linalg.solve_triangular(lower.T, half, upper=True).T.to(torch.float32)
            return weight + shrinkage * step, half.square().sum(0).to(torch.float32)
        ordered = drift if self.order is None else drift[:, self.order]
        half = ordered.to(self.upper.dtype) @ self.upper.T
        step = (half @ self.upper).to(torch.float32)
        if self.order is not None:
            step = torch.empty_like(step).scatter_(1, self.order.expand_as(step), step)
        return weight + shrinkage * step, half.square().sum(1).to(torch.float32)


_RUN = 32


def column_order(hessian: Tensor, name: str, block: int = _RUN) -> Tensor | None:
    """None for `natural`; `descending` sorts by diag H, largest first (ties keep their order); `blocks` sorts blocks of
    `block` columns by their largest, in them runs of 32 (or what divides them) likewise, and in these the columns;
    `min_pivot` does the same from the last to the first with what is left of H when those after are known."""
    if name == "natural":
        return None
    if name == "blocks":
        diagonal, run = hessian.diagonal(), math.gcd(_RUN, block)
        order = torch.argsort(diagonal, descending=True, stable=True)
        # From the inside out: a stable sort by rank of the run, then of the block, keeps what lies in each as it is.
        for size in (run, block):
            rank = torch.argsort(diagonal.view(-1, size).amax(1), descending=True, stable=True).argsort()
            order = order[torch.argsort(rank[order // size], stable=True)]
        return order
    if name == "min_pivot":
        return _min_pivot(hessian, block)
    if name == "descending":
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    raise ValueError(f"unknown column order {name!r}; expected natural, descending, blocks or min_pivot")


def _min_pivot(hessian: Tensor, block: int) -> Tensor:
    """Min-pivot order (arXiv 2507.18553), with blocks kept whole: from the last column to the first, always the block,
    in it the run, in that the column whose input varies least once those that come after it are known.

    GPTQ's error is at most Σ of these variances times a quarter of the squared step.
    """
    size, run = len(hessian), math.gcd(_RUN, block)
    left = hessian.to(torch.float64, copy=True)
    left.diagonal().add_(float(left.diagonal().mean()) * 1e-4)
    blocks, order = list(range(size // block)), list[int]()
    while blocks:
        varies = left.diagonal().view(-1, block).mean(1).tolist()
        chosen = min(blocks, key=varies.__getitem__)
        blocks.remove(chosen)
        runs = list(range(chosen * block // run, (chosen + 1) * block // run))
        while runs:
            varies = left.diagonal().view(-1, run).mean(1).tolist()
            first = min(runs, key=varies.__getitem__)
            runs.remove(first)
            own = slice(first * run, (first + 1) * run)
            order += [own.start + place for place in _pivots(left[own, own].clone())]
            left -= left[:, own] @ torch.linalg.solve(left[own, own], left[own, :])
    return torch.tensor(order[::-1], device=hessian.device)


def _pivots(left: Tensor) -> list[int]:
    """Places of the smallest pivots of a positive matrix [n, n], one elimination after another; `left` is used up."""
    places: list[int] = []
    for _ in range(len(left)):
        diagonal = left.diagonal().clone()
        diagonal[places] = torch.inf
        place = int(diagonal.argmin())
        places.append(place)
        left -= left[:, place, None] * left[None, place] / left[place, place].clone()
    return places


def _inverse(lower: Tensor) -> Tensor:
    """Of a lower triangular matrix, by halves: a third of the products that solving for the identity takes."""
    if len(lower) <= _SOLVED:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = len(lower) // 2
    result = torch.zeros_like(lower)
    result[:half, :half], result[half:, half:] = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    result[half:, :half] = -result[half:, half:] @ (lower[half:, :half] @ result[:half, :half])
    return result


def normal_equations(stats: LayerStats, damping: float, order: str, block: int = _RUN) -> Normal:
    """Factor H + λI with λ = damping · mean(diag H), raising λ tenfold while it is not positive definite.

    Raises SingularError after three tries, ValueError for an unknown order.
    """
    hessian, cross, residual = stats.hessian, stats.cross, stats.residual
    dead = hessian.diagonal() <= 0
    note = ""
    if dead.any():
        hessian, cross = hessian.clone(), cross.clone()
        # Enough to be positive, too little for the scale search to look at; the damping returns the weights themselves.
        unit = float(hessian.diagonal().mean()) / 100 or 1.0
        hessian[dead, dead] = unit
        residual = residual if residual is None else residual.masked_fill(dead, 0.0)
        cross[:, dead] = 0.0
        cross[dead, dead] = unit
        note = f"{int(dead.sum())} inputs never active"
    permutation = column_order(hessian, order, block)
    scale = float(hessian.diagonal()[~dead].mean()) if not bool(dead.all()) else 1.0
    lower, lam, raised = _factor(hessian, damping, scale, permutation)
    if raised:
        note = "; ".join(filter(None, [note, f"damping raised {10**raised}-fold"]))
    return Normal(hessian, cross, _inverse(lower).flip(0, 1), lam, scale, permutation, note, residual)


def conditional_variance(hessian: Tensor, damping: float, order: str, block: int = _RUN) -> Tensor:
    """1 / U_jj² = R_jj² for every column j: what is left of its input's power when those that a sweep meets later are
    known. [features], float32. Raises SingularError."""
    permutation = column_order(hessian, order, block)
    lower, *_ = _factor(hessian, damping, float(hessian.diagonal().mean()) or 1.0, permutation)
    swept = lower.diagonal().flip(0).square().to(torch.float32)
    return swept if permutation is None else torch.empty_like(swept).scatter_(0, permutation, swept)


def _factor(hessian: Tensor, damping: float, scale: float, permutation: Tensor | None) -> tuple[Tensor, float, int]:
    """Lower triangular, of H + λI from the last column in sweep order to the first, float64; λ, and how often it had to
    be raised."""
    backwards = (torch.arange(len(hessian), device=hessian.device) if permutation is None else permutation).flip(0)
    for attempt in range(_TRIES + 1):
        lam = damping * 10**attempt * scale
        damped = hessian[backwards[:, None], backwards].to(torch.float64)
        damped.diagonal().add_(lam)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            return lower, lam, attempt
        damping = damping or 1e-8
    raise SingularError(f"H + λI is not positive definite up to λ = {lam:.3g}")
