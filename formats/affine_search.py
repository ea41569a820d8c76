"""A scale and an offset for each group of weights, `scale · q + offset` with q = 0 … high, by search and least squares.

As in scale_search.py, groups are the columns of [size, groups] arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formats import native
from formats.block import Integers, reciprocal
from formats.scale_search import extremes, in_chunks, to_half
from formats.sums import code_sums, weighted_error

# How many codes the range of the weights is wider than theirs, and how many of these lie below code 0. The negative
# ones matter to weights that come from a grid already: a group rarely meets both of its ends.
_TRIES = (
    (0.0, 0.0), (-0.5, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 0.5), (1.5, 0.75), (2.0, 1.0), (3.0, 1.5),
    (-1.0, 0.0), (-2.0, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Weighed:
    """Weights [size, groups] with their `importance`, and sums w = Σ importance and wx = Σ importance·x.

    All of x is less `origin`, the weight of most importance: where one counts far more than all others, as a massive
    activation's does, sums of squares would leave nothing of these in float32.
    """

    x: Tensor
    importance: Tensor
    origin: Tensor
    w: Tensor
    wx: Tensor

    @staticmethod
    def of(x: Tensor, importance: Tensor) -> Weighed:
        origin = x.gather(0, importance.argmax(0, keepdim=True))
        x = x - origin
        return Weighed(x, importance, origin[0], importance.sum(0), (x * importance).sum(0))

    def moments(self, scale: Tensor, offset: Tensor, high: int) -> Moments:
        """With the codes 0 … `high` nearest under `scale` and `offset` [groups]."""
        inverse, offset = reciprocal(scale), offset - self.origin
        code = Integers(0, high).snap(-offset * inverse)
        return Moments(self, code, *code_sums(self.x, self.importance, Integers(0, high), inverse, offset, code))


@dataclass(frozen=True)
class Moments:
    """What least squares needs to know of weights and codes: a few sums per group, [groups]. All of q is less `code`,
    that of the weight of most importance."""

    of: Weighed
    code: Tensor
    wq: Tensor
    wqx: Tensor
    wqq: Tensor

    def gain(self, scale: Tensor, offset: Tensor) -> Tensor:
        """How much less Σ w·(x − scale·q − offset)² is than if all were as the weight of most importance."""
        offset = offset - self.of.origin + scale * self.code
        explained = scale * self.wqx + offset * self.of.wx
        return 2 * explained - (scale.square() * self.wqq + 2 * scale * offset * self.wq + offset.square() * self.of.w)

    def solve(self, below_zero: bool) -> tuple[Tensor, Tensor]:
        """The best real scale and offset; `below_zero` keeps the offset ≤ 0. NaN where the sums do not decide."""
        w, wx = self.of.w, self.of.wx
        determinant = self.wqq * w - self.wq.square()
        scale = (self.wqx * w - self.wq * wx) / determinant
        offset = self.offset(scale)
        if below_zero:
            above = offset > 0
            scale = torch.where(above, self.scale(torch.zeros_like(scale)), scale)
            offset = torch.where(above, 0.0, offset)
        return scale, offset

    def offset(self, scale: Tensor) -> Tensor:
        """The best for a given scale."""
        return (self.of.wx - scale * self.wq) / self.of.w - scale * self.code + self.of.origin

    def scale(self, zero: Tensor) -> Tensor:
        """The best where code `zero` stands for nothing: that of scale · (q − zero)."""
        code, origin, w, wx = self.code - zero, self.of.origin, self.of.w, self.of.wx
        along = self.wqx + origin * self.wq + code * (wx + origin * w)
        return along / (self.wqq + 2 * code * self.wq + code.square() * w)

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Σ w, Σ w·x, Σ w·q, Σ w·q·x and Σ w·q² of the weights and codes themselves."""
        code, origin, w, wx = self.code, self.of.origin, self.of.w, self.of.wx
        along = self.wqx + origin * self.wq + code * (wx + origin * w)
        power = self.wqq + 2 * code * self.wq + code.square() * w
        return w, wx + origin * w, self.wq + code * w, along, power


def search_affine(x: Tensor, importance: Tensor, high: int, below_zero: bool) -> tuple[Tensor, Tensor]:
    """Real scale ≥ 0 and offset of each group, [groups] each.

    The range of the weights is laid over the codes, then over ranges wider and narrower than the codes at either end
    (so that outliers are clipped); each time least squares gives scale and offset for the codes that follow. The best
    of these is repeated on its own codes.
    """
    compiled = native.search_affine(x, importance, high, below_zero, _TRIES)
    if compiled is not None:
        return compiled
    low, top = extremes(x)
    if below_zero:
        low, top = low.clamp(max=0.0), top.clamp(min=0.0)
    span = top - low
    unit = span / high
    chosen, shift = unit, low
    gain = torch.full_like(low, -torch.inf)
    weighed = Weighed.of(x, importance)

    def try_on(scale: Tensor, offset: Tensor) -> None:
        nonlocal chosen, shift, gain
        known = weighed.moments(scale, offset, high)
        scale, offset = known.solve(below_zero)
        reached = known.gain(scale, offset)
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
        levels = Integers(0, high)
        error = weighted_error(x, imp, best_scale, levels, best_offset)
        scale, offset = search_affine(x, imp, high, below_zero=False)
        scale = to_half(scale)
        # With the scale as stored, the offset has to follow.
        follow = Weighed.of(x, imp).moments(scale, offset, high).offset(scale)
        for candidate in (to_half(offset), to_half(torch.where(torch.isfinite(follow), follow, offset))):
            errors = weighted_error(x, imp, scale, levels, candidate)
            better = errors < error
            error = torch.where(better, errors, error)
            best_scale = torch.where(better, scale, best_scale)
            best_offset = torch.where(better, candidate, best_offset)
        return best_scale, best_offset

    scale, offset = in_chunks(search, weights, importance)
    return scale, offset
