"""Second moments of what a group of linear layers reads, in the float model and in the model quantized so far.

    hessian  H = X̂ᵀX̂ / tokens      cross  G = XᵀX̂ / tokens      [features, features], float32
    residual D = (R − R̂)ᵀX̂ / tokens                             [written, features], float32

X are the float model's inputs, X̂ the quantized model's, tokens are rows (Qronos, arXiv 2505.11695); R and R̂ what a
layer's outputs are added to, in units of these. All are means, as is that of X̂ itself. Products of a batch are of
float32 and are summed in float64, so that neither the order of batches nor who runs which of them shows in what is
rounded. H is symmetric: only its upper panels are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qronos_export.precision import product

_PANELS = 4  # H's upper triangle in 4 × 4 panels costs 10/16 of the full product, and what is on its way a quarter


class Moments(NamedTuple):
    """Of one input: sums or means."""

    hessian: Tensor
    cross: Tensor
    mean: Tensor
    residual: Tensor


class LayerStats:
    """H, G and the number of tokens behind them, for one input shared by some linears; D if outputs of `written`
    numbers are added to the residual stream.

    Sums while tokens come in, float32 means once they are asked for (or `settle` is called).
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", *, written: int = 0) -> None:
        self.features, self.written = features, written
        self.tokens = 0
        self.borrowed = 0  # of these tokens, how many others read
        self.held: LayerStats | None = None  # of those tokens that were held out
        self.device = torch.device(device)
        self._means: Moments | None = None
        self._sums: Moments | None = None

    @classmethod
    def of(cls, hessian: Tensor, cross: Tensor, tokens: int, residual: Tensor | None = None) -> LayerStats:
        """From second moments that are known already, float32 [features, features] each, of inputs of mean zero."""
        residual = hessian[:0] if residual is None else residual
        stats = cls(len(hessian), hessian.device, written=len(residual))
        stats.tokens, stats._means = tokens, Moments(hessian, cross, torch.zeros_like(hessian[0]), residual)
        return stats

    def empty(self) -> LayerStats:
        """Of no tokens yet, for the same layers."""
        return LayerStats(self.features, self.device, written=self.written)

    def update(self, x: Tensor, x_hat: Tensor, gap: Tensor | None = None, *, held: bool = False) -> None:
        """Add one batch of the same tokens in both streams: float [tokens, features] each, and R − R̂ [tokens, written];
        `held` keeps its moments apart as well."""
        if x.shape[0] == 0:
            return
        if held:
            self.held = self.held or self.empty()
            self.held.update(x, x_hat, gap)
        x, x_hat = by_features(x), by_features(x_hat)
        hessian, cross, mean, residual = self.sums
        add_squares(hessian, x_hat)
        add_products(cross, x, x_hat)
        mean.add_(x_hat.sum(1, dtype=torch.float64))
        if gap is not None:
            add_products(residual, by_features(gap), x_hat)
        self.tokens += x.shape[1]

    def borrow(self, other: LayerStats, tokens: int) -> None:
        """Add `other` with the weight of so many tokens."""
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine.add_(theirs, alpha=tokens / other.tokens)
        self.tokens += tokens
        self.borrowed += tokens

    def without_held(self) -> LayerStats:
        """The moments of all tokens that were not held out."""
        assert self.held is not None and self.tokens > self.held.tokens
        rest = self.tokens - self.held.tokens
        keep, gone = self.tokens / rest, self.held.tokens / rest
        mine, held = self.settle(), self.held.settle()
        hessian, cross, _, residual = (keep * whole - gone * part for whole, part in zip(mine, held, strict=True))
        return LayerStats.of(hessian, cross, rest, residual)

    def of_rows(self, rows: Tensor, units: Tensor | None = None) -> LayerStats:
        """The same tokens for some of the layer's rows, int64 [n], D in `units` [n, 1] of each; shares H and G."""
        if not self.written or (units is None and torch.equal(rows.cpu(), torch.arange(self.written))):
            return self
        means = self.settle()
        residual = means.residual[rows.to(self.device)]
        part = LayerStats(self.features, self.device, written=len(rows))
        part.tokens, part.borrowed = self.tokens, self.borrowed
        part._means = means._replace(residual=residual if units is None else residual / units)
        part.held = self.held.of_rows(rows, units) if self.held else None
        return part

    @property
    def sums(self) -> Moments:
        """ΣX̂ᵀX̂ (above its diagonal), ΣXᵀX̂, ΣX̂ and Σ(R − R̂)ᵀX̂ in float64, to be added to in place together with
        `tokens`."""
        if self._sums is None:
            if self._means:
                self._sums, self._means = Moments(*(each.double() * self.tokens for each in self._means)), None
            else:
                zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
                n = self.features
                self._sums = Moments(zeros(n, n), zeros(n, n), zeros(n), zeros(self.written, n))
        return self._sums

    def settle(self) -> Moments:
        """The means, float32, in half the memory of the sums; what was held out settles as well."""
        if self.held:
            self.held.settle()
        if self._means is None:
            sums, self._sums = self.sums, None
            hessian, *others = (each.mul_(1 / max(1, self.tokens)).to(torch.float32) for each in sums)
            self._means = Moments(symmetric(hessian), *others)
        return self._means

    @property
    def hessian(self) -> Tensor:
        return self.settle().hessian

    @property
    def cross(self) -> Tensor:
        return self.settle().cross

    @property
    def mean(self) -> Tensor:
        return self.settle().mean

    @property
    def residual(self) -> Tensor | None:
        """D; None where the layer does not write to the residual stream, or nobody asked."""
        return self.settle().residual if self.written else None


def by_features(x: Tensor) -> Tensor:
    """[tokens, features] as products of moments want it: float32 [features, tokens], on a CPU in one piece."""
    x = x.to(torch.float32).T
    return x.contiguous() if x.device.type == "cpu" else x


def add_squares(total: Tensor, x: Tensor) -> None:
    """Add xxᵀ of x float32 [features, tokens] to `total`; below the diagonal only what panels of columns have there."""
    for rows in _panels(len(x)):
        total[rows, rows.start :].add_(product(x[rows], x[rows.start :]))


def add_products(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add xyᵀ of float32 [features, tokens] each to `total`."""
    for rows in _panels(len(x)):
        total[rows].add_(product(x[rows], y))


def _panels(features: int) -> Iterator[slice]:
    width = max(1, -(-features // _PANELS))
    return (slice(start, start + width) for start in range(0, features, width))


def symmetric(moment: Tensor) -> Tensor:
    """`moment` [features, features] with what is above its diagonal below it as well."""
    upper = moment.triu()
    return upper + upper.triu(1).T
