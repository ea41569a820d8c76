"""λ and β of one group of layers, by what the rounded weights do on tokens that were held out.

For every λ of a few around the recipe's, β is the minimum of a parabola: the projection moves the weights by β·S, and
on held-out moments H', G' the output error ‖XWᵀ − X̂(W + βS)ᵀ‖² is least at β = ⟨W(G' − H'), S⟩ / ⟨SH', S⟩. Weights are
then rounded on the moments of the other tokens, and the λ that leaves the least error is taken for all.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from formats import BlockFormat
from qronos_export.rounding.least_squares import SingularError, normal_equations
from qronos_export.rounding.qronos import qronos
from qronos_export.rounding.rounded import Rounder, Settings
from qronos_export.statistics import LayerStats

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


def chosen(
    weight: Tensor, stats: LayerStats, fmt: BlockFormat, settings: Settings, rounder: Rounder
) -> tuple[Settings, str]:
    """`settings` with the damping, and for Qronos the shrinkage, that suit `weight` [rows, columns] best; and a note.
    The given ones where none of the group's tokens were held out, or all."""
    if stats.held is None or stats.held.tokens == stats.tokens:
        return settings, "no tokens to choose λ and β on"
    train, held = stats.without_held(), stats.held
    best, least, corrects = settings, float("inf"), rounder is qronos
    for factor in FACTORS:
        each = replace(settings, damping=factor * settings.damping)
        try:
            each = replace(each, shrinkage=_shrinkage(weight, train, held, each)) if corrects else each
        except SingularError:
            continue
        values = rounder(weight, train, fmt, each).weight.dequantize()
        # ‖XWᵀ − X̂Qᵀ‖² without ‖XWᵀ‖², which is the same for all
        left = float((values @ held.hessian * values).sum() - 2 * (weight @ held.cross * values).sum())
        if left < least:
            best, least = each, left
    beta = f" and β {best.shrinkage:.2f}" if corrects else ""
    return best, f"λ {best.damping:.2g}{beta} by held-out tokens"


def _shrinkage(weight: Tensor, train: LayerStats, held: LayerStats, settings: Settings) -> float:
    step = normal_equations(train, settings.damping, "natural").project(weight, 1.0)[0] - weight
    along = float((weight @ (held.cross - held.hessian) * step).sum())
    power = float((step @ held.hessian * step).sum())
    return min(1.0, max(0.0, along / power)) if power > 0 else 0.0
