"""Second moments of what a group of linear layers reads, in the float model and in the model quantized so far.

    hessian  H = X̂ᵀX̂ / tokens      cross  G = XᵀX̂ / tokens      [features, features], float32

X are the float model's inputs, X̂ the quantized model's, tokens are rows (Qronos, arXiv 2505.11695). Both are running
means, as is that of X̂ itself, and do not depend on how tokens were batched. H is symmetric: only its upper panels are
computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qronos_export.precision import accumulate

_PANELS = 4  # H's upper triangle in 4 × 4 panels costs 10/16 of the full product


class LayerStats:
    """H, G and the number of tokens behind them, for one input shared by some linears."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self.borrowed = 0  # of these tokens, how many others read
        self.held: LayerStats | None = None  # of those tokens that were held out
        self._hessian = torch.zeros(features, features, device=device)
        self._cross = torch.zeros(features, features, device=device)
        self._mean = torch.zeros(features, device=device)

    @classmethod
    def of(cls, hessian: Tensor, cross: Tensor, tokens: int) -> LayerStats:
        """From second moments that are known already, float32 [features, features] each, of inputs of mean zero."""
        stats = cls(len(hessian), hessian.device)
        stats.tokens, stats._hessian, stats._cross = tokens, hessian, cross
        return stats

    def update(self, x: Tensor, x_hat: Tensor, *, held: bool = False) -> None:
        """Add one batch of the same tokens in both streams: float [tokens, features] each; `held` keeps its moments
        apart as well."""
        new = x.shape[0]
        if new == 0:
            return
        if held:
            self.held = self.held or LayerStats(self.features, self._hessian.device)
            self.held.update(x, x_hat)
        total = self.tokens + new
        keep, gain = self.tokens / total, 1.0 / total
        x, x_hat = by_features(x), by_features(x_hat)
        self._mean.mul_(keep).add_(x_hat.sum(1), alpha=gain)
        accumulate(self._cross, x, x_hat, keep, gain)
        add_squares(self._hessian, x_hat, keep, gain)
        self.tokens = total

    def borrow(self, other: LayerStats, tokens: int) -> None:
        """Add `other` with the weight of so many tokens."""
        share = tokens / (self.tokens + tokens)
        for moment, theirs in zip(self.moments, other.moments, strict=True):
            moment.lerp_(theirs, share)
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
    def device(self) -> torch.device:
        return self._cross.device

    @property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept, to be summed in place over processes, each weighed by its share of the tokens."""
        return self._hessian, self._cross, self._mean

    @property
    def hessian(self) -> Tensor:
        return symmetric(self._hessian)

    @property
    def cross(self) -> Tensor:
        return self._cross

    @property
    def mean(self) -> Tensor:
        return self._mean


def by_features(x: Tensor) -> Tensor:
    """[tokens, features] as products of moments want it: float32 [features, tokens], on a CPU in one piece."""
    x = x.to(torch.float32).T
    return x.contiguous() if x.device.type == "cpu" else x


def add_squares(moment: Tensor, x: Tensor, keep: float, gain: float) -> None:
    """keep · `moment` + gain · xxᵀ in place, of x float32 [features, tokens]; below the diagonal only what panels of
    columns have there."""
    width = -(-len(x) // _PANELS)
    for start in range(0, len(x), width):
        accumulate(moment[start : start + width, start:], x[start : start + width], x[start:], keep, gain)


def symmetric(moment: Tensor) -> Tensor:
    """`moment` [features, features] with what is above its diagonal below it as well."""
    upper = moment.triu()
    return upper + upper.triu(1).T
