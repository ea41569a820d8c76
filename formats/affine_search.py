"""A scale and an offset for each group of weights, `scale · q + offset` with q = 0 … high, by search and least squares.

As in scale_search.py, groups are the columns of [size, groups] arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formats.block import reciprocal
from formats.scale_search import extremes, in_chunks, to_half

# How many codes the range of the weights is wider than theirs, and how many of these lie below code 0. The negative
# ones matter to weights that come from a grid already: a group rarely meets both of its ends.
_TRIES = (
    (0.0, 0.0), (-0.5, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 0.5), (1.5, 0.75), (2.0, 1.0), (3.0, 1.5),
    (-1.0, 0.0), (-2.0, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """What least squares needs to know of weights x with importance w and codes q: a few sums per group, [groups]."""

    w: Tensor
    wx: Tensor
    wq: Tensor
    wqx: Tensor
    wqq: Tensor

    @staticmethod
    def of(x: Tensor, importance: Tensor, codes: Tensor) -> Moments:
        weighted = codes * importance
        return Moments(
            importance.sum(0),
            (x * importance).sum(0),
            weighted.sum(0),
            (weighted * x).sum(0),
            (weighted * codes).sum(0),
        )

    def gain(self, scale: Tensor, offset: Tensor) -> Tensor:
        """Σ w·x² − Σ w·(x − scale·q − offset)²: how much of the weights' power these values explain."""
        explained = scale * self.wqx + offset * self.wx
        return 2 * explained - (scale.square() * self.wqq + 2 * scale * offset * self.wq + offset.square() * self.w)

    def solve(self, below_zero: bool) -> tuple[Tensor, Tensor]:
        """The best real scale and offset; `below_zero` keeps the offset ≤ 0. NaN where the sums do not decide."""
        determinant = self.wqq * self.w - self.wq.square()
        scale = (self.wqx * self.w - self.wq * self.wx) / determinant
        offset = (self.wx - scale * self.wq) / self.w
        if below_zero:
            above = offset > 0
            scale = torch.where(above, self.wqx / self.wqq, scale)
            offset = torch.where(above, 0.0, offset)
        return scale, offset


def affine_codes(x: Tensor, scale: Tensor, offset: Tensor, high: int) -> Tensor:
    """Nearest codes of `x` [size, groups], as float32."""
    return (x - offset).mul_(reciprocal(scale)).round_().clamp_(0, high)


def affine_error(x: Tensor, importance: Tensor, scale: Tensor, offset: Tensor, high: int) -> Tensor:
    """Σ importance · (x − nearest(x))² of each group."""
    codes = affine_codes(x, scale, offset, high)
    return codes.mul_(scale).add_(offset).sub_(x).square_().mul_(importance).sum(0)


def search_affine(x: Tensor, importance: Tensor, high: int, below_zero: bool) -> tuple[Tensor, Tensor]:
    """Real scale ≥ 0 and offset of each group, [groups] each.

    The range of the weights is laid over the codes, then over ranges wider and narrower than the codes at either end
    (so that outliers are clipped); each time least squares gives scale and offset for the codes that follow. The best
    of these is repeated on its own codes.
    """
    low, top = extremes(x)
    if below_zero:
        low, top = low.clamp(max=0.0), top.clamp(min=0.0)
    span = top - low
    unit = span / high
    chosen, shift = unit, low
    gain = torch.full_like(low, -torch.inf)
    w, wx, weighted = importance.sum(0), (x * importance).sum(0), x * importance

    def try_on(scale: Tensor, offset: Tensor) -> None:
        nonlocal chosen, shift, gain
        codes = affine_codes(x, scale, offset, high)
        wqx = (codes * weighted).sum(0)
        power = codes * importance
        moments = Moments(w, wx, power.sum(0), wqx, power.mul_(codes).sum(0))
        scale, offset = moments.solve(below_zero)
        reached = moments.gain(scale, offset)
        better = (reached > gain) & (scale > 0) & torch.isfinite(offset)
        chosen, shift = torch.where(better, scale, chosen), torch.where(better, offset, shift)
        gain = torch.where(better, reached, gain)

    for wider, cut in _TRIES:
        scale = span / (high + wider)
        try_on(scale, low + cut * scale)
    for _ in range(2):
        try_on(chosen, shift)
    return chosen, shift


def best_half_affine(weights: Tensor, importance: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Best fp16 scale and offset found for each group of `weights` [size, groups], [groups] each; never worse than
    the plain rule that puts the range of the weights on the codes."""

    def search(x: Tensor, imp: Tensor) -> tuple[Tensor, Tensor]:
        low, top = extremes(x)
        best_scale, best_offset = to_half((top - low) / high), to_half(low)
        error = affine_error(x, imp, best_scale, best_offset, high)
        scale, offset = search_affine(x, imp, high, below_zero=False)
        scale = to_half(scale)
        # With the scale as stored, the offset has to follow.
        moments = Moments.of(x, imp, affine_codes(x, scale, offset, high))
        follow = (moments.wx - scale * moments.wq) / moments.w
        for candidate in (to_half(offset), to_half(torch.where(torch.isfinite(follow), follow, offset))):
            errors = affine_error(x, imp, scale, candidate, high)
            better = errors < error
            error = torch.where(better, errors, error)
            best_scale = torch.where(better, scale, best_scale)
            best_offset = torch.where(better, candidate, best_offset)
        return best_scale, best_offset

    scale, offset = in_chunks(search, weights, importance)
    return scale, offset
