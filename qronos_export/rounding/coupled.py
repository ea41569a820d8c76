"""Two-sided error diffusion: rows whose errors meet are rounded one after another (BoA, arXiv 2406.13474).

Outputs of the rows of one attention head meet in a product, so the errors E [size, columns] of these rows cost

    tr(A E H Eᵀ),    A [size, size] what the product weighs the outputs with, H the inputs' Hessian

which in E row by row is the Hessian A ⊗ H. Its inverse has the upper triangular factor U_A ⊗ U_H, UᵀU = A⁻¹ and H⁻¹, so
GPTQ on all size · columns weights at once sweeps a row with U_H as ever, and then hands to a later row s of the head

    V_s ← V_s − (U_A[r, s] / U_A[r, r]) (V_r − Q_r)

V_r being what the sweep of row r began with: what column u has lost to feedback, its own error e_u included, is
Σ_t≤u e_t U_H[t, u] / U_H[t, t] = V_r − Q_r. A = I hands on nothing. Whatever A is, the best real weights are those of
the one-sided problem, so Qronos' projection stays; its first code moves with V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qronos_export.rounding.least_squares import SingularError, normal_equations
from qronos_export.statistics import LayerStats

RoundRows = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Targets [rows, columns] and first values [rows] of some rows -> their blocks [rows, bytes] and values."""


@dataclass(frozen=True)
class Coupled:
    """Rows of a weight whose errors meet: `rows` int64 [size], and A, `hessian` float32 [size, size], in any unit."""

    rows: Tensor
    hessian: Tensor


def diffuse_rows(
    target: Tensor, first: Tensor | None, column: int, coupled: Sequence[Coupled], damping: float, round_rows: RoundRows
) -> tuple[Tensor, Tensor, int]:
    """Round `target` [rows, columns], heavy rows of each of `coupled` before its light ones: blocks and values, and how
    many of `coupled` have an A that damping does not make positive definite, so that their rows went alone.

    Rows that wait for the same number of others are rounded together, so this takes `size` calls of `round_rows`, and
    one where every A is diagonal.

    first:    [rows], the values that the first code of each row is chosen by, or None for `target`'s own.
    column:   where that code is.
    damping:  α in α · mean(diag A), added to A's diagonal.
    """
    alone = torch.ones(len(target), dtype=torch.bool, device=target.device)
    heads: list[tuple[list[int], Tensor]] = []  # rows in the order of their turns, and what they hand on
    turns: list[list[tuple[int, int]]] = [[]]  # (head, place of the row among its rows)
    for each in coupled:
        try:
            normal = normal_equations(LayerStats.of(each.hessian, each.hessian, tokens=1), damping, "descending")
        except SingularError:
            continue
        alone[each.rows] = False
        for place, turn in enumerate(_turns(normal.feedback)):
            turns += [[] for _ in range(turn + 1 - len(turns))]
            turns[turn].append((len(heads), place))
        heads.append((each.rows[normal.order].tolist(), normal.feedback))

    size = max((len(rows) for rows, _ in heads), default=0)
    handed = target.new_zeros(len(heads), size, size)  # to a row, by those before it
    lost = target.new_zeros(len(heads), size, target.shape[1])  # V − Q of the rows that are rounded
    for head, (rows, feedback) in enumerate(heads):
        handed[head, : len(rows), : len(rows)] = feedback.triu(1).T

    values, blocks, single = torch.zeros_like(target), None, alone.nonzero()[:, 0]
    for turn, members in enumerate(turns):
        where = [(head, place, heads[head][0][place]) for head, place in members]
        head, place, now = torch.tensor(where, dtype=torch.int64).view(-1, 3).T.to(target.device)
        whole = [head for head, _ in members] == list(range(len(heads)))  # then nothing has to be copied
        taken = torch.bmm(handed[head, place][:, None], lost if whole else lost[head])[:, 0]
        if turn == 0:
            now, taken = torch.cat([now, single]), torch.cat([taken, taken.new_zeros(len(single), target.shape[1])])
        begun = target[now] - taken
        moved = None if first is None else first[now] - taken[:, column]
        part, values[now] = round_rows(begun, moved)
        lost[head, place] = (begun - values[now])[: len(head)]
        if blocks is None:
            blocks = torch.empty(len(target), part.shape[1], dtype=part.dtype, device=part.device)
        blocks[now] = part
    assert blocks is not None
    return blocks, values, len(coupled) - len(heads)


def _turns(feedback: Tensor) -> list[int]:
    """For each row, how many rounds come before the one in which all that it is handed is there."""
    given = (feedback != 0).tolist()
    turns: list[int] = []
    for i in range(len(given)):
        turns.append(max((turns[j] + 1 for j in range(i) if given[j][i]), default=0))
    return turns
