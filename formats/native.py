"""The compiled searches and error feedback (`kernels.cpp`) on tensors. Each tells where torch has to do it: off the
CPU, in another precision than float32, for levels that are floats, or where nothing could be compiled.

Weights x and importance w are [size, groups], a group a column.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_float, c_long, c_void_p

import torch
from torch import Tensor

from formats.block import Codebook, Integers, Levels, cells
from formats.compiled import library


def group_sums(
    x: Tensor,
    importance: Tensor,
    levels: Levels,
    inverse: Tensor,
    offset: Tensor | None,
    scale: Tensor | None = None,
    code: Tensor | None = None,
) -> Tensor | None:
    """Σ w·q, Σ w·q·x and Σ w·q², all of q less `code`: [3, groups]; with a `scale` Σ w·(scale·q + offset − x)²:
    [1, groups]. All else is [groups]."""
    offset = torch.zeros_like(inverse) if offset is None else offset
    scales = inverse.new_empty(0) if scale is None else scale
    if (lib := _library(x, importance, inverse, offset, scales)) is None or (line := _line(levels)) is None:
        return None
    x, importance, inverse, offset, scales = (t.contiguous() for t in (x, importance, inverse, offset, scales))
    found = x.new_empty(3 if scale is None else 1, x.shape[1])
    code = None if code is None else code.contiguous()
    lib.group_sums(*_weights(x, importance), *line, _at(inverse), _at(offset), _maybe(code), _at(scales), _at(found))
    return found


def search_scale(
    x: Tensor, importance: Tensor, levels: Levels, reach: Sequence[float], beside: Sequence[float]
) -> Tensor | None:
    """scale_search.search_scale: [groups]."""
    if (lib := _library(x, importance)) is None or (line := _line(levels)) is None:
        return None
    x, importance = x.contiguous(), importance.contiguous()
    found = x.new_empty(x.shape[1])
    lib.search_scale(*_weights(x, importance), *line, *_list(reach), *_list(beside), _at(found))
    return found


def serves(weights: Tensor, levels: Levels) -> bool:
    """Whether `best_stored_scale` and its like can be called."""
    return _library(weights) is not None and isinstance(levels, Integers | Codebook)


def best_stored_scale(
    weights: Tensor,
    importance: Tensor,
    levels: Levels,
    reach: Sequence[float],
    beside: Sequence[float],
    ue4m3: bool = False,
) -> Tensor:
    """scale_search.best_half_scale, or with halves of UE4M3 instead of fp16, of weights [rows, columns], a group of
    them after another, with importance [groups, size] of as many groups or of those of a row: [groups]."""
    lib, line = _library(weights, importance), _line(levels)
    assert lib is not None and line is not None
    weights, importance = weights.contiguous(), importance.contiguous()
    found = weights.new_empty(weights.numel() // importance.shape[1])
    sizes = c_long(importance.shape[1]), c_long(len(found))
    lib.best_stored_scale(
        *sizes, _at(weights), c_long(len(importance)), _at(importance), *line, *_list(reach), *_list(beside),
        c_bool(ue4m3), _at(found),
    )  # fmt: skip
    return found


def nearest(weights: Tensor, inverse: Tensor, offset: Tensor | None, levels: Integers) -> Tensor | None:
    """Grid.nearest: codes [rows, columns] of (weights − offset) · inverse, both of which are [rows, groups]."""
    if (lib := _library(weights, inverse)) is None:
        return None
    weights, inverse = weights.contiguous(), inverse.contiguous()
    offset = None if offset is None else offset.contiguous()
    codes = torch.empty_like(weights, dtype=torch.int8 if levels.low < 0 else torch.uint8)
    sizes = c_long(weights.numel() // inverse.numel()), c_long(inverse.numel())
    ends = c_float(levels.low), c_float(levels.high)
    lib.nearest_integers(*sizes, _at(weights), _at(inverse), _maybe(offset), *ends, _at(codes))
    return codes


def diffuse(
    work: Tensor,
    errors: Tensor,
    codes: Tensor,
    feedback: Tensor,
    places: Tensor,
    begin: int,
    size: int,
    levels: Levels,
    scales: tuple[Tensor, Tensor, Tensor | None],
    anchors: Tensor | None,
    first: Tensor | None,
) -> bool:
    """ColumnGrid.diffuse, whose `scales` are scale, inverse and offset [groups, rows]; False where torch has to do it.

    work [reach, rows], errors and anchors [columns, rows] are rows of larger tensors, whole and in order, `feedback`
    [columns, reach] is part of one; `places` int64 [columns] are rows of codes [.., rows]. The first rows of `work`
    are left as they were given.
    """
    scale, inverse, offset = scales
    given = [work, errors, feedback, scale, inverse, *(t for t in (offset, anchors, first) if t is not None)]
    if (lib := _library(*given)) is None or (line := _line(levels)) is None:
        return False
    whole = [each for each in (*given, codes, places) if each is not feedback]
    if not (feedback.stride(1) == 1 and all(each.is_contiguous() for each in whole) and places.dtype == torch.int64):
        raise ValueError("these tensors have to be contiguous, and places int64")
    by_cell = cells(levels.levels, torch.device("cpu"))[1] if isinstance(levels, Codebook) else None
    table, *numbers = line
    lib.diffuse(
        c_long(len(errors)), c_long(len(work)), c_long(work.shape[1]), _at(work), _maybe(anchors), _at(feedback),
        c_long(feedback.stride(0)), _maybe(first), _at(places), c_long(begin), c_long(size), _at(scale), _at(inverse),
        _maybe(offset), table, _maybe(by_cell), *numbers, _at(codes), _at(errors),
    )  # fmt: skip
    return True


def best_exponent(weights: Tensor, importance: Tensor, levels: Levels, largest_exponent: int, unit: float) -> Tensor:
    """microscaling.MX.fit of weights [rows, columns], with importance as `best_stored_scale` has it: uint8 [groups]."""
    lib, line = _library(weights, importance), _line(levels)
    assert lib is not None and line is not None
    weights, importance = weights.contiguous(), importance.contiguous()
    found = weights.new_empty(weights.numel() // importance.shape[1], dtype=torch.uint8)
    sizes = c_long(importance.shape[1]), c_long(len(found))
    lib.best_exponent(
        *sizes, _at(weights), c_long(len(importance)), _at(importance), *line, c_long(largest_exponent), c_float(unit),
        _at(found),
    )  # fmt: skip
    return found


def best_ternary_scale(weights: Tensor, importance: Tensor) -> Tensor:
    """scale_search.best_ternary_scale of weights [rows, columns], likewise: float32 [groups]."""
    lib = _library(weights, importance)
    assert lib is not None
    weights, importance = weights.contiguous(), importance.contiguous()
    found = weights.new_empty(weights.numel() // importance.shape[1])
    sizes = c_long(importance.shape[1]), c_long(len(found))
    lib.best_ternary_scale(*sizes, _at(weights), c_long(len(importance)), _at(importance), _at(found))
    return found


def peaks(rows: Tensor, paid: Tensor) -> Tensor | None:
    """t ≥ 0 where Σ max(|v| − t, 0) = a for each row v of `rows` [n, size] and its a of `paid` [n], or 0 where that sum
    is smaller for any t: [n]."""
    if (lib := _library(rows, paid)) is None:
        return None
    rows, paid = rows.contiguous(), paid.contiguous()
    found = torch.empty_like(paid)
    lib.peaks(c_long(rows.shape[1]), c_long(len(rows)), _at(rows), _at(paid), _at(found))
    return found


def search_affine(
    x: Tensor, importance: Tensor, high: int, below_zero: bool, tries: Sequence[tuple[float, float]]
) -> tuple[Tensor, Tensor] | None:
    """affine_search.search_affine, which tries so many codes more and codes below: [groups] each."""
    if (lib := _library(x, importance)) is None:
        return None
    x, importance = x.contiguous(), importance.contiguous()
    scale, offset = x.new_empty(2, x.shape[1])
    numbers, _ = _list([number for pair in tries for number in pair])
    lib.search_affine(
        *_weights(x, importance),
        c_float(high),
        c_bool(below_zero),
        numbers,
        c_long(len(tries)),
        _at(scale),
        _at(offset),
    )
    return scale, offset


def _library(*given: Tensor) -> ctypes.CDLL | None:
    usable = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
    return library() if usable else None


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _maybe(tensor: Tensor | None) -> c_void_p:
    return c_void_p() if tensor is None else _at(tensor)


def _weights(x: Tensor, importance: Tensor) -> tuple[c_long, c_long, c_void_p, c_void_p]:
    return c_long(x.shape[0]), c_long(x.shape[1]), _at(x), _at(importance)


def _list(numbers: Sequence[float]) -> tuple[ctypes.Array[c_float], c_long]:
    return (c_float * len(numbers))(*numbers), c_long(len(numbers))


def _line(levels: Levels) -> tuple[c_void_p, c_float, c_float, c_float] | None:
    """A codebook's table by cells of the line (null: integers), first and last of them, and how many make a unit."""
    if isinstance(levels, Integers):
        return c_void_p(), c_float(levels.low), c_float(levels.high), c_float(1)
    if isinstance(levels, Codebook):
        *_, by_cell, low, per_unit = cells(levels.levels, torch.device("cpu"))
        return _at(by_cell), c_float(low), c_float(low + len(by_cell) - 1), c_float(per_unit)
    return None
