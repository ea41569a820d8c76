"""Second moments of what a group of linear layers reads, in the float model and in the model quantized so far.

    hessian  H = X̂ᵀX̂ / tokens      cross  G = XᵀX̂ / tokens      [features, features], float32

X are the float model's inputs, X̂ the quantized model's, tokens are rows (Qronos, arXiv 2505.11695). Both are means, as
is that of X̂ itself. Products of a batch are of float32 and are summed in float64, so that neither the order of batches
nor who runs which of them shows in what is rounded. H is symmetric: only its upper panels are computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qronos_export.precision import product

_PANELS = 4  # H's upper triangle in 4 × 4 panels costs 10/16 of the full product, and what is on its way a quarter


class LayerStats:
    """H, G and the number of tokens behind them, for one input shared by some linears.

    Sums while tokens come in, float32 means once they are asked for (or `settle` is called).
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self.borrowed = 0  # of these tokens, how many others read
        self.held: LayerStats | None = None  # of those tokens that were held out
        self.device = torch.device(device)
        self._means: tuple[Tensor, Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, hessian: Tensor, cross: Tensor, tokens: int) -> LayerStats:
        """From second moments that are known already, float32 [features, features] each, of inputs of mean zero."""
        stats = cls(len(hessian), hessian.device)
        stats.tokens, stats._means = tokens, (hessian, cross, torch.zeros_like(hessian[0]))
        return stats

    def update(self, x: Tensor, x_hat: Tensor, *, held: bool = False) -> None:
        """Add one batch of the same tokens in both streams: float [tokens, features] each; `held` keeps its moments
        apart as well."""
        if x.shape[0] == 0:
            return
        if held:
            self.held = self.held or LayerStats(self.features, self.device)
            self.held.update(x, x_hat)
        x, x_hat = by_features(x), by_features(x_hat)
        hessian, cross, mean = self.sums
        add_squares(hessian, x_hat)
        add_products(cross, x, x_hat)
        mean.add_(x_hat.sum(1, dtype=torch.float64))
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
        return LayerStats.of(
            keep * self.hessian - gone * self.held.hessian, keep * self.cross - gone * self.held.cross, rest
        )

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """ΣX̂ᵀX̂ (above its diagonal), ΣXᵀX̂ and ΣX̂ in float64, to be added to in place together with `tokens`."""
        if self._sums is None:
            if self._means:
                hessian, cross, mean = (each.double() * self.tokens for each in self._means)
                self._sums, self._means = (hessian, cross, mean), None
            else:
                square = torch.zeros(self.features, self.features, dtype=torch.float64, device=self.device)
                self._sums = square, torch.zeros_like(square), square.new_zeros(self.features)
        return self._sums

    def settle(self) -> tuple[Tensor, Tensor, Tensor]:
        """H, G and the mean of X̂, float32, in half the memory of the sums; what was held out settles as well."""
        if self.held:
            self.held.settle()
        if self._means is None:
            (hessian, cross, mean), self._sums = self.sums, None
            gain = 1 / max(1, self.tokens)
            hessian = symmetric(hessian.mul_(gain).to(torch.float32))
            self._means = hessian, cross.mul_(gain).to(torch.float32), mean.mul_(gain).to(torch.float32)
        return self._means

    @property
    def hessian(self) -> Tensor:
        return self.settle()[0]

    @property
    def cross(self) -> Tensor:
        return self.settle()[1]

    @property
    def mean(self) -> Tensor:
        return self.settle()[2]


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
    width = -(-features // _PANELS)
    return (slice(start, start + width) for start in range(0, features, width))


def symmetric(moment: Tensor) -> Tensor:
    """`moment` [features, features] with what is above its diagonal below it as well."""
    upper = moment.triu()
    return upper + upper.triu(1).T
