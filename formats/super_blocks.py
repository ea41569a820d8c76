"""Super-blocks: sub-blocks whose scales (and offsets) are small integers times the super-block's fp16.

Search gives every sub-block the real scale it wants; then the super-block's fp16 and the integers are settled in turn:
integers by the sums least squares needs, without touching the weights, fp16 by least squares over the super-block,
codes by rounding. Each step ends on storable numbers, and the best state met is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.affine_search import Moments, Weighed, search_affine
from formats.block import Codebook, Integers, Levels, reciprocal
from formats.scale_search import in_chunks, search_scale, to_half
from formats.sums import code_sums, weighted_error

_ROUNDS = 2
_BESIDE = (1, -1, 2)  # integers tried next to the one below the best real scale
_FURTHER = (*_BESIDE, -2, 3, -3, 4)  # last: where few weights count, the best pair of scale and minimum may lie off

State = tuple[Tensor, ...]


def fit_scales(
    weights: Tensor,
    importance: Tensor,
    levels: Integers | Codebook,
    reach: Sequence[float],
    beside: Sequence[float],
    subs: int,
    sub_levels: Integers,
    ends: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """d [supers] and integers sc of `sub_levels` [supers, subs] for values d · sc · level; `weights` [size, groups].

    ends: where the sub-block that wants the largest scale may land, the first is the plain rule.
    """

    def search(x: Tensor, imp: Tensor) -> tuple[Tensor, Tensor]:
        wanted = search_scale(x, imp, levels, reach, beside).view(-1, subs)
        largest = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))
        best = _rounded(largest / ends[0], wanted, sub_levels)
        error = _error(x, imp, levels, best)
        for end in ends[1:]:
            state = _rounded(largest / end, wanted, sub_levels)
            best, error = _better(best, error, state, _error(x, imp, levels, state))
        for _ in range(_ROUNDS):
            d, sc = best
            _, *sums = code_sums(x, imp, levels, reciprocal((d * sc).view(-1)))
            along, power = (part.view(-1, subs) for part in sums)
            fresh = (sc * along).sum(1, keepdim=True) / (sc.square() * power).sum(1, keepdim=True)
            wanted = torch.where(power > 0, along / power, d * sc)
            state = _rounded(torch.where(torch.isfinite(fresh), fresh, d), wanted, sub_levels)
            best, error = _better(best, error, state, _error(x, imp, levels, state))
        d, sc = best
        return d[:, 0], _beside(x, imp, levels, sub_levels, d, sc)

    d, sc = in_chunks(search, weights, importance, subs)
    return d, sc


def _rounded(d: Tensor, wanted: Tensor, sub_levels: Integers) -> State:
    d = to_half(d)
    return d, sub_levels.snap(wanted * reciprocal(d))


def _error(x: Tensor, importance: Tensor, levels: Levels, state: State) -> Tensor:
    return _errors(x, importance, levels, state).sum(1, keepdim=True)


def _errors(x: Tensor, importance: Tensor, levels: Levels, state: State) -> Tensor:
    """Of every sub-block: [supers, subs]."""
    d, sc = state
    return weighted_error(x, importance, (d * sc).view(-1), levels).view(sc.shape)


def _beside(x: Tensor, importance: Tensor, levels: Levels, sub_levels: Integers, d: Tensor, sc: Tensor) -> Tensor:
    """The best of sc − 1, sc and sc + 1 for each sub-block: where few weights count, the integer nearest to the best
    real scale need not be the best integer. d [supers, 1] or [groups] that suits sc."""
    best: State = (sc,)
    error = _errors(x, importance, levels, (d, sc))
    for step in (-1, 1):
        other = (sc + step).clamp_(sub_levels.low, sub_levels.high)
        best, error = _better(best, error, (other,), _errors(x, importance, levels, (d, other)))
    return best[0]


def _better(best: State, error: Tensor, state: State, reached: Tensor) -> tuple[State, Tensor]:
    """Of two states of every super-block (or sub-block) the one of less error; the first where they are equal."""
    lower = reached < error
    return tuple(torch.where(lower, new, old) for new, old in zip(state, best, strict=True)), reached.minimum(error)


def fit_scales_and_mins(
    weights: Tensor, importance: Tensor, levels: Integers, subs: int, sub_levels: Integers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, dmin [supers] and integers sc, m of `sub_levels` [supers, subs] for values d · sc · q − dmin · m.

    Codes q of `levels` and both integers begin at 0. `weights` [size, groups].
    """
    high, top = levels.high, sub_levels.high

    def search(x: Tensor, imp: Tensor) -> tuple[Tensor, ...]:
        scale, offset = search_affine(x, imp, high, below_zero=True)
        weighed = Weighed.of(x, imp)
        moments = weighed.moments(scale, offset, high)
        scale, least = scale.view(-1, subs), -offset.view(-1, subs)
        largest, deepest = scale.amax(1, keepdim=True), least.amax(1, keepdim=True)
        d, dmin = to_half(largest / top), to_half(deepest / top)
        best = (d, dmin, *_integers(moments, scale, d, dmin, top))
        error = _affine_error(x, imp, high, best)
        for share in (0.96, 1.03):
            d = to_half(largest / (share * top))
            state = (d, dmin, *_integers(moments, scale, d, dmin, top))
            best, error = _better(best, error, state, _affine_error(x, imp, high, state))
        for steps in (_BESIDE, _FURTHER):  # a round each
            d, dmin, sc, m = best
            moments = weighed.moments((d * sc).view(-1), (-dmin * m).view(-1), high)
            d, dmin = _least_squares(moments, d, dmin, sc, m)
            real, _ = moments.solve(below_zero=True)
            real = torch.where(torch.isfinite(real), real, (d * sc).view(-1)).view(-1, subs)
            state = (d, dmin, *_integers(moments, real, d, dmin, top, steps))
            best, error = _better(best, error, state, _affine_error(x, imp, high, state))
        d, dmin, sc, m = best
        return d[:, 0], dmin[:, 0], sc, m

    d, dmin, sc, m = in_chunks(search, weights, importance, subs)
    return d, dmin, sc, m


def _affine_error(x: Tensor, importance: Tensor, high: int, state: State) -> Tensor:
    d, dmin, sc, m = state
    errors = weighted_error(x, importance, (d * sc).view(-1), Integers(0, high), (-dmin * m).view(-1))
    return errors.view(sc.shape).sum(1, keepdim=True)


def _integers(
    moments: Moments, scale: Tensor, d: Tensor, dmin: Tensor, top: int, steps: Sequence[int] = _BESIDE
) -> State:
    """The best (sc, m) of every sub-block for its codes: sc `steps` from ⌊scale/d⌋, and for each the m that follows.

    Rounding them apart would ignore that they stand in for each other: all codes are positive.
    """
    below, per_min = (scale * reciprocal(d)).floor_(), reciprocal(dmin)

    def pair(step: int) -> tuple[State, Tensor]:
        sc = (below + step).clamp(0, top)
        m = (-moments.offset((d * sc).view(-1)).view(scale.shape) * per_min).round_().clamp_(0, top)
        return (sc, m), -moments.gain((d * sc).view(-1), (-dmin * m).view(-1)).view(scale.shape)

    best, error = pair(0)
    for step in steps:
        best, error = _better(best, error, *pair(step))
    return best


def _least_squares(moments: Moments, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 d and dmin that suit all sub-blocks best, given integers and codes; the old ones where that is undecided."""
    w, wx, wq, wqx, wqq = (part.view(sc.shape) for part in moments.sums())
    a, b, c = ((t).sum(1, keepdim=True) for t in (sc.square() * wqq, sc * m * wq, m.square() * w))
    p, q = ((t).sum(1, keepdim=True) for t in (sc * wqx, m * wx))
    determinant = a * c - b.square()
    fresh, fresh_min = (p * c - b * q) / determinant, (p * b - a * q) / determinant
    usable = torch.isfinite(fresh) & torch.isfinite(fresh_min) & (fresh > 0) & (fresh_min >= 0)
    return to_half(torch.where(usable, fresh, d)), to_half(torch.where(usable, fresh_min, dmin))


def refit_scale(
    x: Tensor,
    importance: Tensor,
    levels: Integers | Codebook,
    reach: Sequence[float],
    beside: Sequence[float],
    sub_levels: Integers,
    d: Tensor,
    sc: Tensor,
) -> Tensor:
    """A better sc for groups `x` [size, groups] under a given d, or the old one; all others are [groups]."""
    wanted = search_scale(x, importance, levels, reach, beside)
    fresh = sub_levels.snap(wanted * reciprocal(d))
    (sc,), _ = _better(
        (sc,),
        weighted_error(x, importance, d * sc, levels),
        (fresh,),
        weighted_error(x, importance, d * fresh, levels),
    )
    return _beside(x, importance, levels, sub_levels, d, sc)


def refit_scale_and_min(
    x: Tensor, importance: Tensor, high: int, top: int, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor
) -> State:
    """A better sc, m for groups `x` [size, groups] under given d and dmin, or the old ones; all others are [groups]."""
    scale, offset = search_affine(x, importance, high, below_zero=True)
    moments = Weighed.of(x, importance).moments(scale, offset, high)
    fresh_sc, fresh_m = _integers(moments, scale, d, dmin, top, _FURTHER)
    levels = Integers(0, high)
    best, _ = _better(
        (sc, m),
        weighted_error(x, importance, d * sc, levels, -dmin * m),
        (fresh_sc, fresh_m),
        weighted_error(x, importance, d * fresh_sc, levels, -dmin * fresh_m),
    )
    return best


def replaced(numbers: Tensor, group: int, fresh: Tensor) -> Tensor:
    """`numbers` [rows, groups] with column `group` replaced by `fresh` [rows]."""
    numbers = numbers.clone()
    numbers[:, group] = fresh
    return numbers
