"""λ, ρ and β of one group of layers, by what they do on tokens that were held out.

For a ρ, the projection moves the weights by β·S, S = (W(G − H) + D)(H + ρI)⁻¹ on the moments of the other tokens, and
on held-out moments H', G', D' the output error ‖XWᵀ + R − X̂(W + βS)ᵀ − R̂‖² is least at
β = ⟨W(G' − H') + D', S⟩ / ⟨SH', S⟩. Then some of
the rows are rounded with a λ, and their output error on the held-out tokens tells. Both searches begin with what is
given and go by half powers of ten, up or down, while that is better. Rows that attention couples are tried one-sided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from formats import BlockFormat
from qronos_export.rounding.least_squares import Normal, SingularError, normal_equations
from qronos_export.rounding.qronos import qronos
from qronos_export.rounding.rounded import Rounder, Settings
from qronos_export.statistics import LayerStats

STEP, FAR = 10**0.5, 4  # how much λ or ρ changes at once, and how often at most
_ROWS = 256  # enough to tell one λ from another


def chosen(weight: Tensor, stats: LayerStats, fmt: BlockFormat, settings: Settings, rounder: Rounder) -> Settings:
    """`settings` with the damping, and for Qronos the ridge and the shrinkage, that suit `weight` [rows, columns] best;
    as they are where none of the group's tokens were held out, or all."""
    if stats.held is None or stats.held.tokens == stats.tokens:
        return settings
    train, held = stats.without_held(), stats.held
    rows = torch.arange(0, len(weight), -(-len(weight) // _ROWS))
    sample, few, tell = weight[rows.to(weight.device)], train.of_rows(rows), held.of_rows(rows)

    def rounded(steps: int) -> tuple[float, Settings]:
        each = replace(settings, damping=settings.damping * STEP**steps)
        values = rounder(sample, few, fmt, each).weight.dequantize()
        # ‖XWᵀ + R − X̂Qᵀ − R̂‖² without ‖XWᵀ + R − R̂‖², which is the same for all
        wanted = _with(tell, sample @ held.cross)
        return float((values @ held.hessian * values).sum() - 2 * (wanted * values).sum()), each

    if rounder is qronos:
        try:
            normal = normal_equations(train, settings.damping, "natural")
            settings = _least(lambda steps: _corrected(weight, normal, held, settings, steps))
        except SingularError:
            return settings
    return _least(rounded)


def _corrected(
    weight: Tensor, normal: Normal, held: LayerStats, settings: Settings, steps: int
) -> tuple[float, Settings]:
    """The held-out output error that a ridge leaves with its best β, but for a constant; and these settings."""
    ridge = (settings.damping if settings.ridge is None else settings.ridge) * STEP**steps
    step = normal.project(weight, 1.0, ridge)[0] - weight
    along = float((_with(held, weight @ (held.cross - held.hessian)) * step).sum())
    power = float((step @ held.hessian * step).sum())
    shrinkage = min(1.0, max(0.0, along / power)) if power > 0 else 0.0
    return shrinkage**2 * power - 2 * shrinkage * along, replace(settings, ridge=ridge, shrinkage=shrinkage)


def _with(stats: LayerStats, moment: Tensor) -> Tensor:
    """`moment` [rows, features] of outputs with that of what they are added to."""
    return moment if stats.residual is None else moment + stats.residual


def _least(tried: Callable[[int], tuple[float, Settings]]) -> Settings:
    """What has the least error: from 0 upwards while that lowers it; if it does not at all, downwards."""
    error, best = tried(0)
    for step in (1, -1):
        for steps in range(step, step * (FAR + 1), step):
            less, found = tried(steps)
            if not less < error:
                break
            error, best = less, found
        if steps != step:
            break
    return best
