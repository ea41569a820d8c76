"""Scales for integer levels: search, then least squares, always ending on a number the file can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from formats.block import Integers, reciprocal

_HALF_MAX = 65504.0
_CHUNK = 1 << 17  # weights at a time on a CPU: temporaries stay in the cache


def to_half(scale: Tensor) -> Tensor:
    """The nearest finite fp16, as float32."""
    return scale.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16).to(torch.float32)


def weighted_error(weights: Tensor, importance: Tensor, scale: Tensor, levels: Integers) -> Tensor:
    """Σ importance · (w − nearest(w))² of each group: [groups] for `weights` [size, groups], `scale` [groups]."""
    codes = _codes(weights, reciprocal(scale), levels)
    return codes.mul_(scale).sub_(weights).square_().mul_(importance).sum(0)


def _codes(weights: Tensor, inverse: Tensor, levels: Integers) -> Tensor:
    return (weights * inverse).round_().clamp_(levels.low, levels.high)


def search_scale(weights: Tensor, importance: Tensor, levels: Integers, reach: Sequence[float]) -> Tensor:
    """Best real, signed scale of each group: float32 [groups] for `weights` and `importance` [size, groups].

    The weight of largest magnitude m is put on each number of `reach` in turn (its sign decides the sign of the
    scale), then half and a quarter beside the best of them. Given the codes that follow, the best scale is
    Σ w·x·q / Σ w·q² and lowers the error by (Σ w·x·q)² / Σ w·q². The candidate that lowers it most wins. Groups of
    zeros get scale 0.
    """
    return _in_chunks(lambda x, imp: _search(x, imp, levels, reach), weights, importance)


def _search(x: Tensor, importance: Tensor, levels: Integers, reach: Sequence[float]) -> Tensor:
    weighted = x * importance
    peak = _peak(x)
    per_peak = reciprocal(peak)
    chosen, gain = peak / reach[0], torch.zeros_like(peak)
    anchors = torch.full_like(peak, reach[0])

    def try_on(anchor: Tensor) -> None:
        nonlocal chosen, gain, anchors
        codes = _codes(x, per_peak * anchor, levels)
        along = (codes * weighted).sum(0)
        scale = along / codes.square_().mul_(importance).sum(0)
        better = along * scale > gain  # false where all codes are 0: 0/0 compares as false
        chosen = torch.where(better, scale, chosen)
        gain = torch.where(better, along * scale, gain)
        anchors = torch.where(better, anchor, anchors)

    for start in reach:
        try_on(torch.full_like(peak, start))
    for beside in (0.5, 0.25):
        best = anchors
        try_on(best - beside)
        try_on(best + beside)
    return chosen


def _in_chunks(function: Callable[[Tensor, Tensor], Tensor], weights: Tensor, importance: Tensor) -> Tensor:
    """`function` of some groups at a time, its results [groups] joined."""
    if weights.device.type != "cpu":
        return function(weights, importance)
    step = max(1, _CHUNK // weights.shape[0])
    parts = zip(weights.split(step, dim=1), importance.split(step, dim=1), strict=True)
    return torch.cat([function(x.contiguous(), imp.contiguous()) for x, imp in parts])


def _peak(weights: Tensor) -> Tensor:
    """The signed weight of largest magnitude of each group; [size, groups] → [groups]."""
    low, high = weights.aminmax(dim=0)
    return torch.where(-low > high, low, high)


def refine(weights: Tensor, importance: Tensor, scale: Tensor, levels: Integers) -> Tensor:
    """Least-squares scale for the codes that `scale` [groups] gives; unchanged where all codes are 0."""
    codes = _codes(weights, reciprocal(scale), levels)
    power = (codes.square() * importance).sum(0)
    return torch.where(power > 0, (codes * weights * importance).sum(0) / power, scale)


def best_half_scale(weights: Tensor, importance: Tensor, levels: Integers, reach: Sequence[float]) -> Tensor:
    """Best fp16 scale found for each group: float32 [groups] for `weights` and `importance` [size, groups].

    Never worse than the plain rule that puts the largest weight on reach[0].
    """
    return _in_chunks(lambda x, imp: _best_half(x, imp, levels, reach), weights, importance)


def _best_half(x: Tensor, importance: Tensor, levels: Integers, reach: Sequence[float]) -> Tensor:
    best = to_half(_peak(x) / reach[0])
    error = weighted_error(x, importance, best, levels)
    found = _search(x, importance, levels, reach)
    for candidate in (to_half(found), to_half(refine(x, importance, found, levels))):
        challenger = weighted_error(x, importance, candidate, levels)
        better = challenger < error
        best, error = torch.where(better, candidate, best), torch.where(better, challenger, error)
    return best


def grouped(weights: Tensor, importance: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Weights and importance [rows, columns] as [size, groups]: a group is a column, so that reductions stream."""
    flat = weights.reshape(-1, size).T
    if importance is None:
        return flat, torch.ones_like(flat)
    return flat, importance.to(torch.float32).expand_as(weights).reshape(-1, size).T
