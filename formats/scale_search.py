"""One scale for each group of weights: search, then least squares, always ending on a number the file can hold.

Groups that share a scale are the columns of [size, groups] arrays, so that reductions stream through memory and all
groups go at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from formats import native
from formats.block import Codebook, Integers, Levels, reciprocal
from formats.parallel import at_once, side_by_side
from formats.sums import code_sums, weighted_error

_HALF_MAX = 65504.0
_UNIMPORTANT = 1e-6

Store = Callable[[Tensor], Tensor]


def to_half(scale: Tensor) -> Tensor:
    """The nearest finite fp16, as float32."""
    return scale.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16).to(torch.float32)


def grouped(weights: Tensor, importance: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Weights and importance [rows, columns] as [size, groups]: a group is a column.

    `settled` says how importance is read.
    """
    flat = weights.reshape(-1, size).T
    if importance is None:
        return flat, torch.ones_like(flat)
    shared = settled(importance, weights.shape[1], size).T
    return flat, shared if shared.shape == flat.shape else shared.repeat(1, len(weights))


def settled(importance: Tensor, columns: int, size: int) -> Tensor:
    """Importance, of all rows together or of each, by groups: float32 [groups, size].

    In units of its largest, so that its own unit is no matter. A group of no importance weighs alike inside and next to
    nothing beside others; so does, with full weight, one whose importance is not finite.
    """
    importance = importance.to(torch.float32)
    largest = importance.nan_to_num(0.0, posinf=0.0).amax()
    given = len(importance) if importance.ndim > 1 else 1
    importance = (importance * reciprocal(largest)).expand(given, columns).reshape(-1, size)
    total = importance.sum(1, keepdim=True)
    undecided = ~((total > 0) & torch.isfinite(total))
    return torch.where(undecided, torch.where(total == 0, _UNIMPORTANT, 1.0), importance)


def in_chunks(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], weights: Tensor, importance: Tensor, multiple: int = 1
) -> tuple[Tensor, ...]:
    """`function` of some groups at a time, a multiple of `multiple`; its results joined along their first dimension."""
    step = max(1, at_once(weights.device) // (weights.shape[0] * multiple)) * multiple
    if weights.device.type != "cpu" or weights.shape[1] <= step:
        return function(weights.contiguous(), importance.contiguous())
    parts = zip(weights.split(step, dim=1), importance.split(step, dim=1), strict=True)
    found = side_by_side(lambda part: function(part[0].contiguous(), part[1].contiguous()), parts, weights.device)
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def peak(weights: Tensor) -> Tensor:
    """The signed weight of largest magnitude of each group; [size, groups] → [groups]."""
    low, high = extremes(weights)
    return torch.where(-low > high, low, high)


def extremes(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group: [groups] each of [size, groups]. Ten times as fast as `aminmax`."""
    return weights.amin(0), weights.amax(0)


def search_scale(
    x: Tensor, importance: Tensor, levels: Integers | Codebook, reach: Sequence[float], beside: Sequence[float]
) -> Tensor:
    """Best real, signed scale of each group: float32 [groups] for `x` and `importance` [size, groups].

    The weight of largest magnitude is put on each number of `reach` in turn (its sign decides the sign of the scale),
    then on what lies `beside` the best of them on either hand; at last the weight of largest w·x² on its level and
    both beside it, for that one may count more than all others. Given the codes q that follow, the best scale is
    Σ w·x·q / Σ w·q² and lowers the error by (Σ w·x·q)² / Σ w·q². The candidate that lowers it most wins. Groups of
    zeros get scale 0.
    """
    compiled = native.search_scale(x, importance, levels, reach, beside)
    if compiled is not None:
        return compiled
    top = peak(x)
    per_peak = reciprocal(top)
    chosen, gain = top / reach[0], torch.zeros_like(top)
    anchors = torch.full_like(top, reach[0])

    def try_on(anchor: Tensor, per_weight: Tensor = per_peak) -> None:
        nonlocal chosen, gain, anchors
        _, along, power = code_sums(x, importance, levels, per_weight * anchor)
        scale = along / power
        lowered = along * scale
        better = lowered > gain  # false where all codes are 0: 0/0 compares as false
        chosen = torch.where(better, scale, chosen)
        gain = torch.where(better, lowered, gain)
        anchors = torch.where(better, anchor, anchors)

    for start in reach:
        try_on(torch.full_like(top, start))
    for step in beside:
        best = anchors
        try_on(best - step)
        try_on(best + step)
    heaviest = x.gather(0, (importance * x * x).argmax(0, keepdim=True))[0]
    level = levels.snap(heaviest * reciprocal(chosen))
    for steps in (-1, 0, 1):
        try_on(levels.beside(level, steps), reciprocal(heaviest))
    return chosen


def refine(x: Tensor, importance: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Least-squares scale for the codes that `scale` [groups] gives; unchanged where all codes are 0."""
    _, along, power = code_sums(x, importance, levels, reciprocal(scale))
    return torch.where(power > 0, along / power, scale)


def best_half_scale(
    weights: Tensor,
    importance: Tensor | None,
    size: int,
    levels: Integers | Codebook,
    reach: Sequence[float],
    beside: Sequence[float] = (0.5, 0.25),
) -> Tensor:
    """Best fp16 scale found for each `size` columns: float32 [rows, groups] for `weights` [rows, columns]."""
    if not native.serves(weights, levels):
        return best_scale(*grouped(weights, importance, size), levels, reach, beside).view(len(weights), -1)
    return by_rows(
        lambda rows, shared: native.best_stored_scale(rows, shared, levels, reach, beside), weights, importance, size
    )


def by_rows(
    search: Callable[[Tensor, Tensor], Tensor], weights: Tensor, importance: Tensor | None, size: int
) -> Tensor:
    """`search` of some rows of `weights` [rows, columns] at a time, with their importance [groups, size] or that of any
    row, so that a core's cache holds them: [rows, groups] of what it finds, [groups]."""
    rows, columns = weights.shape
    shared = weights.new_ones(1, size) if importance is None else settled(importance, columns, size)
    each = len(shared) == weights.numel() // size  # every row has its own
    step = max(1, at_once(weights.device) // columns)

    def part(first: int) -> Tensor:
        groups = slice(first * columns // size, (first + step) * columns // size)
        return search(weights[first : first + step], shared[groups] if each else shared)

    return torch.cat(side_by_side(part, range(0, rows, step), weights.device)).view(rows, -1)


def best_scale(
    weights: Tensor,
    importance: Tensor,
    levels: Integers | Codebook,
    reach: Sequence[float],
    beside: Sequence[float] = (0.5, 0.25),
    store: Store = to_half,
) -> Tensor:
    """Best storable scale found for each group: float32 [groups] for `weights` and `importance` [size, groups].

    store: maps a real scale to the nearest one the file can hold. Never worse than the plain rule that puts the
    largest weight on reach[0].
    """

    def search(x: Tensor, imp: Tensor) -> tuple[Tensor]:
        found = search_scale(x, imp, levels, reach, beside)
        plain = peak(x) / reach[0]
        return (best_of([plain, found, refine(x, imp, found, levels)], x, imp, levels, store),)

    return in_chunks(search, weights, importance)[0]


def best_of(candidates: Sequence[Tensor], x: Tensor, importance: Tensor, levels: Levels, store: Store) -> Tensor:
    """Of some scales [groups], as stored, the one of least error for each group; the first of equals."""
    best = store(candidates[0])
    error = weighted_error(x, importance, best, levels)
    for candidate in candidates[1:]:
        challenger = store(candidate)
        errors = weighted_error(x, importance, challenger, levels)
        better = errors < error
        best, error = torch.where(better, challenger, best), torch.where(better, errors, error)
    return best


def best_ternary_scale(weights: Tensor, importance: Tensor | None, size: int) -> Tensor:
    """The best real scale s for levels −s, 0, s: float32 [rows, groups of `size`] for `weights` [rows, columns].

    The k weights of largest magnitude get ±s for some k; given k, s = Σ w|x| / Σ w over them lowers the error by
    (Σ w|x|)² / Σ w. Sorting once tries every k; compiled, they are sorted into 256 bins, and what ends in a bin is
    left to least squares.
    """
    if native.serves(weights, Integers(-1, 1)):
        return by_rows(native.best_ternary_scale, weights, importance, size)

    def search(x: Tensor, imp: Tensor) -> tuple[Tensor]:
        x, imp = x.T.contiguous(), imp.T.contiguous()  # sorted where they lie side by side: three times as fast
        magnitude, order = x.abs().sort(dim=1, descending=True)
        ordered = imp.gather(1, order)
        along, power = (magnitude * ordered).cumsum(1), ordered.cumsum(1)
        best = (along.square() / power).nan_to_num_(0.0).argmax(1, keepdim=True)
        return ((along.gather(1, best) / power.gather(1, best)).nan_to_num_(0.0)[:, 0],)

    return in_chunks(search, *grouped(weights, importance, size))[0].view(len(weights), -1)
