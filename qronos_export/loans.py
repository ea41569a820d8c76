"""Experts that few tokens are sent to learn from tokens of others as well.

Error feedback by a Hessian of hardly more tokens than inputs fits what these few tokens happen to be; rounding to
nearest does less harm. All experts of a layer read the same hidden states, so what the others' tokens look like is the
best guess at what more of its own would: at "up" the pooled moments of the layer, at "down" what the expert itself
makes of tokens spread evenly over the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qronos_export.precision import Linear
from qronos_export.statistics import LayerStats
from qronos_export.suspended import Activation, Routed, expert_inner

ENOUGH_TOKENS_PER_FEATURE = 4.0  # docs/measurements.md, "Experts that see few tokens"


class Loans:
    """Of one experts module, in one quantized stream."""

    def __init__(
        self, experts: Any, quantized: Any, activation: Activation | None, tokens: int, linear: Linear = F.linear
    ) -> None:
        """`activation` rounds what "up" reads in the quantized stream; `tokens` are those counted in all processes;
        `linear` multiplies by the weights."""
        self._experts, self._quantized, self._tokens, self._linear = experts, quantized, tokens, linear
        self._activation: Callable[[Tensor], Tensor] = activation or (lambda x: x)
        self._own: list[int] = []
        self._read: dict[int, int] = {}  # expert -> tokens offered at "down" so far

    def pool(self, stats: Sequence[LayerStats]) -> None:
        """At "up", when all tokens are in: those of `stats` that have too few borrow from the sum of all."""
        self._own = [each.tokens for each in stats]
        missing = [_missing(each.tokens, each.features) for each in stats]
        if not any(missing):
            return
        whole = LayerStats(stats[0].features, stats[0].device)
        for each in stats:
            if each.tokens:
                whole.borrow(each, each.tokens)
        for each, wanted in zip(stats, missing, strict=True):
            if lent := min(wanted, whole.tokens):
                each.borrow(whole, lent)

    def read(self, expert: int, stats: LayerStats, x: Routed, x_hat: Routed) -> tuple[Tensor, Tensor]:
        """At "down": what `expert` makes in both streams of some tokens of a micro-batch, sent to it or not: float
        [borrowed, intermediate] each."""
        share = min(1.0, _missing(self._own[expert], stats.features) / self._tokens)
        start = self._read.get(expert, 0)
        end = self._read[expert] = start + len(x.hidden)
        steps = (torch.arange(start, end + 1, dtype=torch.float64, device=x.hidden.device) * share).floor()
        rows = steps.diff().nonzero()[:, 0]  # the same tokens however they are batched
        return (
            expert_inner(self._experts, expert, x.hidden[rows], self._linear),
            expert_inner(self._quantized, expert, self._activation(x_hat.hidden[rows]), self._linear),
        )

    def settle(self, stats: Sequence[LayerStats]) -> None:
        """At "down", when all tokens are in."""
        for each, own in zip(stats, self._own, strict=True):
            each.borrowed = each.tokens - own


def _missing(tokens: int, features: int) -> int:
    return max(0, round(ENOUGH_TOKENS_PER_FEATURE * features) - tokens)
