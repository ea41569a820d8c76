"""Sums over groups that the searches consist of: what least squares needs, and the error that is left.

Weights x and importance w are [size, groups], a group a column; all else is [groups]. Code q of a weight is the level
nearest to (x − offset) · inverse.
"""

from __future__ import annotations

from torch import Tensor

from formats import native
from formats.block import Levels, reciprocal


def code_sums(
    x: Tensor,
    importance: Tensor,
    levels: Levels,
    inverse: Tensor,
    offset: Tensor | None = None,
    code: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w·q, Σ w·q·x and Σ w·q², all of q less `code`."""
    compiled = native.group_sums(x, importance, levels, inverse, offset, code=code)
    if compiled is not None:
        return compiled[0], compiled[1], compiled[2]
    codes = levels.snap(x * inverse if offset is None else (x - offset).mul_(inverse))
    if code is not None:
        codes -= code
    weighted = codes * importance
    return weighted.sum(0), (weighted * x).sum(0), weighted.mul_(codes).sum(0)


def weighted_error(
    x: Tensor, importance: Tensor, scale: Tensor, levels: Levels, offset: Tensor | None = None
) -> Tensor:
    """Σ w·(scale·q + offset − x)², with inverse = 1 / scale: what rounding to nearest leaves."""
    inverse = reciprocal(scale)
    compiled = native.group_sums(x, importance, levels, inverse, offset, scale)
    if compiled is not None:
        return compiled[0]
    if offset is None:
        stored = levels.snap(x * inverse).mul_(scale)
    else:
        stored = levels.snap((x - offset).mul_(inverse)).mul_(scale).add_(offset)
    return stored.sub_(x).square_().mul_(importance).sum(0)
